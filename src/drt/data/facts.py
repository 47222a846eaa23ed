"""Invented facts in many wordings, to be planted in a text and asked for later.

The wordings here are for training. Benchmarks ask in words of their own ("One of the special magic numbers for X is"),
which are kept out, so that what a benchmark measures was never trained word for word.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NOT_IN_TEXT = "The text does not say."

_NOUNS = (
    "access code", "account number", "alias", "badge number", "birthplace", "booking reference", "call sign",
    "catalog number", "code word", "contact", "deadline", "destination", "favorite color", "favorite dish",
    "first name", "hiding place", "home town", "invoice number", "key", "license plate", "locker number",
    "middle name", "nickname", "order number", "passphrase", "password", "phone extension", "pin", "postal code",
    "price", "profession",
    "project name", "registration", "room number", "score", "seat", "serial number", "ship", "supervisor",
    "ticket number", "tracking number", "username", "weight", "winning number",
)  # fmt: skip

# {n}: noun, {k}: key, {v}: value.
_STATEMENTS = (
    "The {n} of {k} is {v}.",
    "{k}'s {n} is {v}.",
    "Remember that the {n} for {k} is {v}.",
    "Note: {k} has the {n} {v}.",
    "For {k}, the {n} was given as {v}.",
    "It was agreed that {v} would be the {n} of {k}.",
    "They wrote down {v} as the {n} for {k}.",
    "{v} is the {n} that belongs to {k}.",
    "{n} ({k}): {v}",
    "{k} | {n} | {v}",
    "If anyone asks for the {n} of {k}, say {v}.",
    "\"The {n} of {k},\" he said, \"is {v}.\"",
    "An important detail: the {n} of {k} is {v}.",
    "In the register, {k} stands with the {n} {v}.",
)  # fmt: skip
_QUESTIONS = (
    "What is the {n} of {k}?",
    "What is {k}'s {n}?",
    "Which {n} does {k} have?",
    "Tell me the {n} of {k}.",
    "What was given as the {n} for {k}?",
    "According to the text, what is the {n} of {k}?",
    "Do you know the {n} of {k}?",
)
_CLOZES = (
    "The {n} of {k} is",
    "{k}'s {n} is",
    "As noted, the {n} for {k} is",
    "{n} ({k}):",
    "According to the text, the {n} of {k} is",
)
_ALL_QUESTIONS = (
    "List every {n} of {k}.",
    "What are all the {n}s of {k}?",
    "Which {n}s does {k} have?",
    "Name each {n} that the text gives for {k}.",
)
_ALL_CLOZES = ("The {n}s of {k} are", "Every {n} of {k} in the text:")
_SEVERAL_QUESTIONS = (
    "What are the {n}s of {k}?",
    "Give the {n} of each of these: {k}.",
    "For {k}: what is the {n} of each?",
)
_SEVERAL_CLOZES = ("The {n}s of {k} are", "In this order, the {n}s for {k}:")
_PROMPTS = (
    "\n\nQuestion: {q}\nAnswer:",
    "\n\nQ: {q}\nA:",
    "\n\n{q}\n",
    "\n\nAnswer in a few words. {q}\nAnswer:",
)
_CLOZE_PROMPTS = ("\n\n{q}", "\n{q}", " {q}", "\n\nQuestion: complete the sentence.\nAnswer: {q}")
# {a}: a new name, {b}: what it stands for.
_LINKS = (
    "Let {a} be {b}.",
    "Set {a} to {b}.",
    "{a} := {b}",
    "{a} takes the value of {b}.",
    "{a} stands for {b}.",
)
_LINK_QUESTIONS = (
    "Which names stand for {v}?",
    "List all names whose value is {v}.",
    "Find every name that was set to {v}, directly or through another name.",
)


@dataclass(frozen=True)
class Fact:
    """Something to plant and to ask for.

    Attributes:
        kind: ``fact``, ``list`` (several values or several keys) or ``chain``.
        statements: sentences to plant, in this order.
        values: the value in each statement, word for word; for a chain the new name in it.
        prompt: what asks.
        answer: the right continuation of the prompt, with its leading space if it has one.
    """

    kind: str
    statements: tuple[str, ...]
    values: tuple[str, ...]
    prompt: str
    answer: str


class FactMaker:
    """Draws facts.

    Args:
        words: lowercase words and names of the language, for keys and values.
        names: capitalized ones.
    """

    def __init__(self, words: Sequence[str], names: Sequence[str]) -> None:
        self.words, self.names = words, names

    def fact(self, rng: np.random.Generator) -> Fact:
        """One key with one value."""
        noun, key, value = _pick(_NOUNS, rng), self._key(rng), self._value(rng)
        statement = _pick(_STATEMENTS, rng).format(n=noun, k=key, v=value)
        prompt, answer = self._ask(_QUESTIONS, _CLOZES, rng, f"{value}", n=noun, k=key)
        return Fact("fact", (statement,), (value,), prompt, answer)

    def missing(self, rng: np.random.Generator) -> Fact:
        """A question about nothing that the text holds."""
        noun, key = _pick(_NOUNS, rng), self._key(rng)
        question = _pick(_QUESTIONS, rng).format(n=noun, k=key)
        prompt = _pick(_PROMPTS, rng).format(q=question)
        return Fact("missing", (), (), prompt, _lead(prompt) + NOT_IN_TEXT)

    def several_values(self, rng: np.random.Generator) -> Fact:
        """One key with two to four values, all of which are asked for."""
        noun, key, count = _pick(_NOUNS, rng), self._key(rng), int(rng.integers(2, 5))
        make = self._value_kind(rng)
        values = tuple(dict.fromkeys(make(rng) for _ in range(count)))
        statement = _pick(_STATEMENTS[:8], rng)
        statements = tuple(statement.format(n=noun, k=key, v=value) for value in values)
        prompt, answer = self._ask(_ALL_QUESTIONS, _ALL_CLOZES, rng, _listed(values, rng), n=noun, k=key)
        return Fact("list", statements, values, prompt, answer)

    def several_keys(self, rng: np.random.Generator) -> Fact:
        """Two to four keys with a value each, all of which are asked for."""
        noun, count, make = _pick(_NOUNS, rng), int(rng.integers(2, 5)), self._value_kind(rng)
        keys = tuple(dict.fromkeys(self._key(rng) for _ in range(count)))
        values = tuple(make(rng) for _ in keys)
        statement = _pick(_STATEMENTS, rng)
        statements = tuple(
            statement.format(n=noun, k=key, v=value) for key, value in zip(keys, values, strict=True)
        )
        asked = _joined(keys)
        prompt, answer = self._ask(
            _SEVERAL_QUESTIONS, _SEVERAL_CLOZES, rng, _listed(values, rng), n=noun, k=asked
        )
        return Fact("list", statements, values, prompt, answer)

    def chain(self, rng: np.random.Generator) -> Fact:
        """A value and two to five names for it, each given by the one before."""
        count, length = int(rng.integers(2, 6)), int(rng.integers(3, 7))
        names = tuple(dict.fromkeys(self._variable(rng, length) for _ in range(count)))
        value = str(int(rng.integers(10_000, 100_000)))
        link = _pick(_LINKS, rng)
        statements = tuple(
            link.format(a=name, b=given) for name, given in zip(names, (value, *names), strict=False)
        )
        prompt = _pick(_PROMPTS, rng).format(q=_pick(_LINK_QUESTIONS, rng).format(v=value))
        return Fact("chain", statements, names, prompt, _lead(prompt) + ", ".join(names))

    def _ask(
        self,
        questions: Sequence[str],
        clozes: Sequence[str],
        rng: np.random.Generator,
        answer: str,
        **fields: str,
    ) -> tuple[str, str]:
        """A prompt, and the answer as it continues it."""
        if rng.random() < 0.4:
            prompt = _pick(_CLOZE_PROMPTS, rng).format(q=_pick(clozes, rng).format(**fields))
        else:
            prompt = _pick(_PROMPTS, rng).format(q=_pick(questions, rng).format(**fields))
        return prompt, _lead(prompt) + answer

    def _word(self, rng: np.random.Generator) -> str:
        return _pick(self.words, rng)

    def _name(self, rng: np.random.Generator) -> str:
        return _pick(self.names, rng)

    def _key(self, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < 0.35:
            return f"{self._word(rng)}-{self._word(rng)}"
        if kind < 0.55:
            return f"{self._name(rng)} {self._name(rng)}"
        if kind < 0.7:
            return f"the {self._word(rng)} {self._word(rng)}"
        if kind < 0.8:
            return f"{self._word(rng)} {int(rng.integers(2, 10_000))}"
        return _uuid(rng) if kind < 0.9 else self._word(rng)

    def _value(self, rng: np.random.Generator) -> str:
        return self._value_kind(rng)(rng)

    def _value_kind(self, rng: np.random.Generator) -> Callable[[np.random.Generator], str]:
        """A kind of value, as what draws one."""
        kinds = (
            (0.45, lambda r: _number(r, int(r.integers(3, 9)))),
            (0.60, lambda r: _number(r, 7)),
            (0.75, self._word),
            (0.85, lambda r: f"{self._word(r)} {self._word(r)}"),
            (0.90, lambda r: f"{self._name(r)} {self._name(r)}"),
            (0.97, _uuid),
            (1.01, lambda r: f"{self._variable(r, 3)}-{int(r.integers(100, 10_000))}"),
        )
        draw = rng.random()
        return next(make for bound, make in kinds if draw < bound)

    def _variable(self, rng: np.random.Generator, length: int) -> str:
        return "".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, length))


def harvest_words(text: str) -> tuple[list[str], list[str]]:
    """Words of a text for keys and values: lowercase ones of 4 to 10 letters, and names, each once, in order."""
    words = dict.fromkeys(re.findall(r"(?<=[a-z] )[a-z]{4,10}(?= [a-z])", text))
    names = dict.fromkeys(re.findall(r"(?<=[a-z] )[A-Z][a-z]{3,9}(?=[ ,.])", text))
    return list(words), list(names)


def question_prompt(question: str, rng: np.random.Generator) -> str:
    """A question in one of the forms that prompts have."""
    return _pick(_PROMPTS, rng).format(q=question)


def answer_after(prompt: str, answer: str) -> str:
    """An answer as it continues a prompt: after a space, or at the start of a line."""
    return _lead(prompt) + answer


def _lead(prompt: str) -> str:
    return "" if prompt.endswith(("\n", " ")) else " "


def _listed(values: Sequence[str], rng: np.random.Generator) -> str:
    return ", ".join(values) if rng.random() < 0.5 else _joined(values)


def _joined(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16)))


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
