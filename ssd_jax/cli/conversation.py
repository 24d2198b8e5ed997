"""A conversation as a value."""

import dataclasses
from typing import Self

type Message = dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What was said.

    Attributes:
        system: the system message, if any.
        messages: of user and assistant in turns; a user's alone at the end waits for its answer.
        attempt: how often the last answer was asked for again.
        open_ids: tokens of prompt and answer where the last answer was cut; empty if it ended.
    """

    system: str | None = None
    messages: tuple[Message, ...] = ()
    attempt: int = 0
    open_ids: tuple[int, ...] = ()

    def for_template(self) -> list[Message]:
        """All messages, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def with_question(self, text: str) -> Self:
        """With a message of the user at its end."""
        message = {"role": "user", "content": text}
        return dataclasses.replace(self, messages=(*self.messages, message), attempt=0, open_ids=())

    def with_answer(self, text: str, open_ids: tuple[int, ...] = ()) -> Self:
        """With the model's answer at its end, or more of it, if it is there already."""
        messages, before = self.messages, ""
        if messages and messages[-1]["role"] == "assistant":
            messages, before = messages[:-1], messages[-1]["content"]
        message = {"role": "assistant", "content": before + text}
        return dataclasses.replace(self, messages=(*messages, message), open_ids=open_ids)

    def without_last(self) -> Self:
        """Before the last message."""
        return dataclasses.replace(self, messages=self.messages[:-1], open_ids=())
