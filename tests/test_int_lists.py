"""Lists in one array are the lists that were put in."""

from hypothesis import given
from hypothesis import strategies as st

from distill_jax.int_lists import MIN_SHARED, IntLists, Prompts

NUMBERS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@given(st.lists(NUMBERS))
def test_lists_come_back(lists: list[list[int]]):
    held = IntLists()
    assert [held.append(each) for each in lists] == list(range(len(lists)))
    assert [list(each) for each in held] == lists
    assert held.lengths.tolist() == [len(each) for each in lists]
    for number, each in enumerate(lists):
        assert [held.get(number, i) for i in range(held.length(number))] == each


@given(st.lists(st.tuples(st.integers(0, 60), NUMBERS), min_size=1), st.integers(0, 60))
def test_prompts_have_what_all_begin_with_only_once(parts: list, start: int):
    prompts = [[*range(size), 7, *rest] for size, rest in parts]
    held = Prompts(prompts)
    shortest = min(map(len, prompts)) - 1
    common = next(n for n in range(shortest, -1, -1) if len({(*p[:n],) for p in prompts}) == 1)
    assert held.num_common == (common if common >= MIN_SHARED else 0)
    for number, prompt in enumerate(prompts):
        assert held.length(number) == len(prompt)
        for place in (0, min(start, common), common):
            assert list(held.behind(number, place)) == prompt[place:]
