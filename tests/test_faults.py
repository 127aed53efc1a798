"""The list of all faults that the teacher's side survives, and the tests that produce them.

The numbers are those of the project's fault list. A test that is named here must exist.
"""

import ast
from pathlib import Path

import pytest

ROWS = {
    "01 429 with Retry-After in seconds, milliseconds or as a date": [
        "test_client.test_retry_after_in_all_its_forms",
        "test_client.test_retry_after_holds_everyone_back",
        "test_client.test_rate_limits_do_not_use_up_the_attempts",
        "test_governor.test_a_named_wait_is_a_lower_bound_and_costs_no_attempt",
        "test_rates.test_01_the_limit_finds_what_a_server_takes",
    ],
    "02 429 without header, 50 at once": [
        "test_governor.test_a_burst_of_refusals_halves_the_limit_once_and_it_comes_back",
        "test_rates.test_02_a_burst_of_50_refusals_loses_nothing_and_the_pace_comes_back",
    ],
    "03 Retry-After of an hour, or garbage": [
        "test_rates.test_03_a_long_wait_is_granted_up_to_a_limit",
        "test_client.test_a_wait_longer_than_our_patience_stops_the_run",
        "test_client.test_retry_after_in_all_its_forms",
    ],
    "04 no quota left": ["test_client.test_what_would_fail_for_every_prompt_stops_at_once"],
    "05 key refused or revoked in mid-run": [
        "test_security.test_05_a_key_that_is_replaced_in_mid_run_is_read_again",
        "test_batching.test_05_a_key_that_is_replaced_while_a_batch_is_out_is_read_again",
        "test_security.test_05_a_new_key_that_is_refused_too_ends_the_run",
        "test_security.test_05_a_key_file_is_nobody_elses",
        "test_security.test_05_a_canary_key_is_found_in_nothing_that_is_written",
        "test_client.test_what_would_fail_for_every_prompt_stops_at_once",
    ],
    "06 a parameter that the model refuses": [
        "test_compatibility.test_06_what_a_model_refuses_is_found_out_once_and_remembered",
        "test_compatibility.test_06_answers_are_found_whatever_is_refused_later",
        "test_compatibility.test_06_a_refusal_that_can_not_be_helped_is_no_loop",
        "test_dialect.test_refusals",
    ],
    "07 a prompt that is too long, a model that is unknown": [
        "test_client.test_a_prompt_that_is_too_long_fails_alone",
        "test_client.test_what_would_fail_for_every_prompt_stops_at_once",
    ],
    "08 the server's errors": [
        "test_client.test_a_fault_is_tried_again_and_never_taken_for_an_answer",
        "test_client.test_attempts_are_bounded_and_a_failed_slot_is_told",
        "test_governor.test_waits_grow_and_end",
        "test_governor.test_the_circuit_opens_over_half_probes_alone_and_closes",
        "test_rates.test_08_a_server_in_trouble_is_left_alone_and_then_asked_again",
        "test_rates.test_08_a_server_that_stays_in_trouble_ends_the_run",
    ],
    "09 a server that can't be reached": [
        "test_client.test_an_unreachable_server_ends_the_run_and_costs_nothing",
    ],
    "10 connection lost after sending": [
        "test_client.test_a_fault_is_tried_again_and_never_taken_for_an_answer",
        "test_client.test_what_may_have_been_billed_counts_as_spent",
    ],
    "11 time limits and a slow drip": [
        "test_client.test_drip_is_ended_by_the_total_time",
        "test_rates.test_11_silence_is_a_timeout_that_may_have_been_billed",
    ],
    "12 status 200 with anything but JSON": [
        "test_client.test_a_fault_is_tried_again_and_never_taken_for_an_answer",
        "test_client.test_paid_answers_without_text_are_bounded_more_tightly",
    ],
    "13 status 200 with an error, or without choices": [
        "test_compatibility.test_13_an_error_with_status_200_is_what_its_code_says",
        "test_compatibility.test_13_an_error_with_status_200_may_end_the_run",
        "test_client.test_a_fault_is_tried_again_and_never_taken_for_an_answer",
    ],
    "14 no content, a refusal, reasoning alone": [
        "test_compatibility.test_14_reasoning_alone_is_no_answer_and_is_kept",
        "test_compatibility.test_14_a_refusal_is_not_asked_again",
        "test_compatibility.test_what_was_cut_is_asked_for_once_more_with_twice_the_tokens",
    ],
    "15 cut by the token limit": [
        "test_compatibility.test_what_was_cut_is_asked_for_once_more_with_twice_the_tokens",
        "test_compatibility.test_15_what_stays_cut_is_told_and_never_trained_on",
    ],
    "16 cut, but reported as whole": [
        "test_compatibility.test_what_was_cut_is_asked_for_once_more_with_twice_the_tokens",
    ],
    "17 filtered": ["test_client.test_cut_and_filtered_answers_are_told_and_not_asked_again"],
    "18 fewer or more choices than asked": [
        "test_client.test_a_server_that_ignores_n_is_asked_for_the_rest",
        "test_client.test_missing_and_surplus_choices",
        "test_compatibility.test_18_a_server_that_ignores_n_is_asked_one_by_one_from_then_on",
    ],
    "19 the same text for every sample": [
        "test_compatibility.test_19_a_teacher_that_does_not_sample_is_pointed_out_once",
        "test_lesson.test_every_verdict",
    ],
    "20 no usage": [
        "test_compatibility.test_20_without_usage_the_worst_case_stays_spent_and_is_marked",
        "test_audit.test_uses_of_a_model",
    ],
    "21 another model answers": ["test_client.test_another_model_answers_is_said_once"],
    "22 killed at any point": [
        "test_interrupts.test_killed_in_mid_lesson_nothing_answered_is_asked_again",
        "test_interrupts.test_many_kills_at_random_moments",
        "test_client.test_an_answer_that_a_killed_process_left_unread_is_read_and_not_asked_again",
        "test_rounds.test_a_run_killed_in_every_stage_ends_with_the_same_records",
    ],
    "23 power loss": [
        "test_ledger.test_commits_reach_the_disk",
        "test_disk.test_23_a_file_is_on_disk_before_it_gets_its_name",
    ],
    "24 a torn last line": [
        "test_run_folder.test_a_file_torn_at_any_byte_keeps_its_whole_lines",
        "test_run_folder.test_a_tail_that_is_no_row_is_cut_off",
    ],
    "25 disk full or not writable": [
        "test_disk.test_25_a_limit_on_file_sizes_stops_the_run_and_loses_no_answer",
        "test_disk.test_25_with_little_room_left_nothing_is_asked",
        "test_disk.test_25_a_folder_that_can_not_be_written_is_said_before_anything_is_asked",
        "test_disk.test_25_the_reserve_holds_its_room_and_gives_it_back",
        "test_ledger.test_a_full_disk_is_an_error_of_the_disk_and_loses_nothing",
    ],
    "26 two processes on one run": [
        "test_run_folder.test_a_second_process_is_kept_out_and_told_who_works",
    ],
    "27 steps of the clock": ["test_rates.test_27_steps_of_the_wall_clock_change_nothing"],
    "28 many calls at the edge of the budget": [
        "test_ledger.test_budget_agrees_with_exact_bookkeeping",
        "test_ledger.test_budget_holds_when_threads_compete",
        "test_client.test_budget_stops_before_the_request_that_could_exceed_it",
        "test_disk.test_entries_share_their_way_to_the_disk",
    ],
    "29 more tokens than a minute allows": [
        "test_rates.test_29_more_tokens_than_a_minute_has_are_refused_before_anything_is_sent",
    ],
    "30 hostile text": [
        "test_security.test_30_hostile_text_stays_data",
        "test_client.test_half_a_character_is_replaced_in_the_text_and_kept_in_the_ledger",
        "test_security.test_30_an_answer_without_end_is_cut_off_and_refused",
        "test_prompts.test_no_text_can_imitate_the_prompt",
        "test_progress.test_hostile_text_never_steers_the_terminal",
        "test_report.test_page_holds_no_foreign_element_and_no_control_character",
    ],
    "31 hostile question ids": ["test_security.test_31_a_question_id_is_never_a_file_name"],
    "32 a ledger that was changed or is damaged": [
        "test_disk.test_32_a_changed_answer_is_reported_and_asked_again",
        "test_disk.test_32_any_flipped_byte_is_noticed_or_harmless",
        "test_audit.test_32_a_damaged_file_is_one_sentence",
        "test_ledger.test_foreign_files_are_left_alone",
    ],
    "33 batches that expire, fail or come in disorder": [
        "test_batching.test_33_what_finished_is_kept_and_the_rest_handed_in_again",
        "test_batching.test_a_batch_of_a_former_process_is_found_again",
        "test_batching.test_a_batch_that_is_out_is_collected_by_chat_too",
        "test_batching.test_a_batch_made_without_an_answer_is_not_made_twice",
    ],
}


@pytest.mark.parametrize("row", ROWS)
def test_every_fault_has_its_test(row: str):
    for name in ROWS[row]:
        file, function = name.split(".")
        tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_no_fault_is_left_out():
    assert [int(row.split()[0]) for row in ROWS] == list(range(1, 34))
