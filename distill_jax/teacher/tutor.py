"""The built-in stand-in teacher: an OpenAI-compatible server on this machine.

It knows the worked solutions of a question set and looks up the last question of a prompt. So a
run, a test or a first hour with this project needs no network, no key and no money. A token is a
word, a number or a sign here, with the white space before it.
"""

import hashlib
import math
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

import pydantic
import uvicorn
from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from distill_jax.config import TUTOR, TutorConfig
from distill_jax.prompts import JUDGE_IT, feedback_prompt, unfenced
from distill_jax.records import Question
from distill_jax.teacher.explanation import (
    NUM_WORDINGS,
    WRONG_STEP,
    explain,
    first_wrong_step,
    tellings,
)
from distill_jax.teacher.transport import SAMPLES_HEADER

HOST = "127.0.0.1"

_BLOCK = re.compile(r"(?:\A|\n)(?=Question: )")
_AFTER_QUESTION = re.compile(r"\n(?=(?:Wrong Solution|Hint|(?:Better )?Reasoning|Answer):)")
_MISTAKE = re.compile(r"\nWrong Solution:(.*)")
_TIP = re.compile(WRONG_STEP.format(step=".*?"))  # quotes a wrong step
_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])")


class Message(pydantic.BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(pydantic.BaseModel):
    """The part of a chat request that makes a difference here; other keys are let through."""

    model: Literal["tutor"]
    messages: Annotated[list[Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=NUM_WORDINGS)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    stream: Literal[False] = False


class Tutor:
    """A question set, and how often its tutor errs.

    Args:
      questions: Those it can explain.
      tutor: The rates of wrong answers, per sample.
      seed: What a request gets back is a function of this, its last message and the sample.
    """

    def __init__(self, questions: Sequence[Question], *, tutor: TutorConfig, seed: int):
        self._questions = {_head(_ask(question)): question for question in questions}
        self._rates, self._seed = tutor, seed

    def answer(self, prompt: str, *, samples: int | Sequence[int]) -> list[str] | None:
        """Explains the last question of a prompt in different words; None if it is unknown.

        Args:
          prompt: What is asked.
          samples: How many answers, or the indices of those that are wanted: each is another one.

        Example:
          >>> tom = Question("t/1", "How many?", "8", "train", "numeric", solution="5 + 3 = 8.")
          >>> tutor = Tutor([tom], tutor=TutorConfig(wrong_rates=(0.0, 0.0)), seed=0)
          >>> asked = "Question: Who?\\nReasoning: I.\\n\\nQuestion: How many?\\nReasoning:"
          >>> tutor.answer(asked, samples=2)
          ['5 + 3 = 8.\\nAnswer: 8', 'First, 5 + 3 = 8. So, the answer is 8.\\nAnswer: 8']
        """
        prompt, slots = unfenced(prompt), range(samples) if isinstance(samples, int) else samples
        question, block = self._find(prompt)
        if question is None:
            return None
        if JUDGE_IT in block:
            return [self._judge(question, block, slot) for slot in slots]
        mistake, rate = self._situation(block)
        identity = f"tutor {self._seed} {prompt}"
        return [
            explain(
                question,
                mistake=mistake,
                wrong=_draw(identity, f"right or wrong {slot}") < rate,
                way=slot,
                seed=f"{identity} {slot}",
            )
            for slot in slots
        ]

    def tellings(self, prompt: str) -> list[tuple[str, float]]:
        """All that it may answer, with probabilities; none where it judges or knows nothing."""
        question, block = self._find(unfenced(prompt))
        if question is None or JUDGE_IT in block:
            return []
        mistake, rate = self._situation(block)
        return tellings(question, mistake=mistake, wrong=rate)

    def _find(self, prompt: str) -> tuple[Question | None, str]:
        """The last question of a prompt, and all that is said of it."""
        block = _BLOCK.split(prompt)[-1]
        return self._questions.get(_head(block)), block

    def _situation(self, block: str) -> tuple[str | None, float]:
        """The mistake that is shown, and how likely a wrong answer is."""
        found = _MISTAKE.search(block)
        mistake = found[1].strip() if found else None
        return mistake, self._rates.wrong_rates[mistake is not None]

    def _judge(self, question: Question, block: str, slot: int) -> str:
        """Whether no step of a rationale is wrong; in error as often as one shown a mistake."""
        reasoning = _TIP.sub("", block.partition("\nReasoning:")[2])
        right = first_wrong_step(reasoning, question.solution) is None
        identity = f"tutor {self._seed} {block}"
        if _draw(identity, f"judgement {slot}") < self._rates.wrong_rates[1]:
            right = not right
        return "Answer: Yes" if right else "Answer: No"


def _ask(question: Question) -> str:
    return feedback_prompt(question, mistake=None, hint=False, demonstrations="")


def _head(block: str) -> str:
    """The question and its choices, as they stand in a prompt."""
    return " ".join(_AFTER_QUESTION.split(block, maxsplit=1)[0].split())


def _draw(identity: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(f"{purpose} {identity}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def make_app(tutor: Tutor) -> Starlette:
    """The HTTP side: `POST /v1/chat/completions`, without streaming, and `GET /v1/models`."""

    async def chat(request: Request) -> JSONResponse:
        try:
            wanted = ChatRequest.model_validate_json(await request.body())
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if name == "model":
                return _error(404, "model_not_found", f"there is one model, {TUTOR!r}.")
            return _error(400, "invalid_value", f"{name or 'body'}: {first['msg']}.")
        prompt = wanted.messages[-1].content
        named = [
            int(index) for index in re.findall(r"\d+", request.headers.get(SAMPLES_HEADER, ""))
        ]
        samples = named if len(named) == wanted.n else wanted.n
        texts = await run_in_threadpool(tutor.answer, prompt, samples=samples)
        if texts is None:
            return _error(400, "unknown_question", "the last question of the prompt is not known.")
        told = await run_in_threadpool(tutor.tellings, prompt) if wanted.logprobs else []
        return JSONResponse(_completion(wanted, texts, told))

    async def models(_: Request) -> JSONResponse:
        model = {"id": TUTOR, "object": "model", "created": 0, "owned_by": "distill_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
        ]
    )


def _error(status: int, code: str, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def _completion(
    wanted: ChatRequest, texts: Sequence[str], told: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    limit = wanted.max_completion_tokens or wanted.max_tokens
    tokens = [_TOKEN.findall(text) for text in texts]
    weighed = [(_TOKEN.findall(text), share) for text, share in told]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(said[:limit])},
            "finish_reason": "stop" if limit is None or len(said) <= limit else "length",
            "logprobs": _likelihoods(said[:limit], weighed, wanted.top_logprobs) if told else None,
        }
        for index, said in enumerate(tokens)
    ]
    num_prompt = sum(len(_TOKEN.findall(message.content)) for message in wanted.messages)
    num_said = sum(len(said[:limit]) for said in tokens)
    return {
        "id": "chatcmpl-tutor",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": TUTOR,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_said,
            "total_tokens": num_prompt + num_said,
        },
    }


def _likelihoods(
    said: Sequence[str], told: Sequence[tuple[list[str], float]], top: int
) -> dict[str, Any]:
    """How likely each token of an answer was behind those before it, and the `top` likeliest.

    Args:
      said: The tokens of the answer, one of those told.
      told: The tokens of all answers that there may be, each with its probability.
      top: At most.
    """
    content = []
    for place, token in enumerate(said):
        shares: dict[str, float] = {}
        for tokens, share in told:
            if place < len(tokens):
                shares[tokens[place]] = shares.get(tokens[place], 0.0) + share
        total = sum(share for _, share in told)
        ordered = sorted(shares, key=shares.__getitem__, reverse=True)
        chances = {text: _log_probability(text, shares[text] / total) for text in ordered}
        content.append(chances[token] | {"top_logprobs": [chances[text] for text in ordered[:top]]})
        told = [each for each in told if each[0][place : place + 1] == [token]]
    return {"content": content}


def _log_probability(text: str, share: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(share), "bytes": list(text.encode())}


@contextmanager
def serve(
    questions: Sequence[Question], *, tutor: TutorConfig, seed: int, port: int = 0
) -> Iterator[str]:
    """Serves a tutor in the background while the `with` block runs.

    Args:
      questions: Those it can explain.
      tutor: How often it errs.
      seed: As for `Tutor`.
      port: On the loopback address; 0 takes any that is free.

    Yields:
      The base URL, which answers at once.

    Raises:
      ValueError: the port is taken.
    """
    listener = _listen(port)
    server = _server(Tutor(questions, tutor=tutor, seed=seed))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="tutor")
    thread.start()
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def serve_forever(
    questions: Sequence[Question], *, tutor: TutorConfig, seed: int, port: int
) -> NoReturn:
    """Serves a tutor until the process is interrupted; says where on stdout.

    Raises:
      ValueError: the port is taken.
      KeyboardInterrupt: in the end.
    """
    listener = _listen(port)
    print(_url(listener), flush=True)
    _server(Tutor(questions, tutor=tutor, seed=seed)).run(sockets=[listener])
    raise KeyboardInterrupt  # a signal that comes while the server starts ends it without a word


def _server(tutor: Tutor) -> uvicorn.Server:
    config = uvicorn.Config(
        make_app(tutor), lifespan="off", ws="none", log_config=None, access_log=False
    )
    return uvicorn.Server(config)


def _listen(port: int) -> socket.socket:
    """A socket that takes connections from now on, before anyone serves them."""
    try:
        return socket.create_server((HOST, port), backlog=1024)
    except OSError as error:
        raise ValueError(
            f"port {port} of {HOST} can't be used ({error.strerror}); name another, or 0 for any."
        ) from None


def _url(listener: socket.socket) -> str:
    return f"http://{HOST}:{listener.getsockname()[1]}/v1"
