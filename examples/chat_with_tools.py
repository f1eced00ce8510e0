# SPDX-License-Identifier: Apache-2.0
"""A chat of several turns whose answers come from tools, through the OpenAI API.

The model is made to call a tool after each question; the calls run here, their results go back as
messages, and it answers, or calls again. Every request repeats the whole conversation, which the
server reads from its cache. The last one, a summary for the record, asks by a header for KV without
loss. For any server that runs with the `--tool-call-parser` of its model, and
`--enable-cache-report`: `python examples/chat_with_tools.py --url http://127.0.0.1:30000`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from openai import OpenAI

STOCK = {"tent": 4, "stove": 11, "lamp": 0}
DAYS = {"Norway": 3, "Spain": 2, "Chile": 9}
QUESTIONS = (
    "Do you still have a tent for me?",
    "And a lamp? If not, what else could I take?",
    "I live in Norway. When would it all arrive?",
)
MAX_ROUNDS = 4
"""Of tool calls after a question: a model that never stops calling is cut off."""


def in_stock(item: str) -> dict[str, Any]:
    return {"item": item, "pieces": STOCK[item]}


def delivery(country: str) -> dict[str, Any]:
    return {"country": country, "days": DAYS[country]}


def tool(function: Callable[..., Any], description: str, **parameters: Any) -> dict[str, Any]:
    """As the OpenAI API describes a tool; all `parameters`, JSON schemas by name, are required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    about = {"name": function.__name__, "description": description, "parameters": schema}
    return {"type": "function", "function": about}


FUNCTIONS: dict[str, Callable[..., Any]] = {"in_stock": in_stock, "delivery": delivery}
TOOLS: list[Any] = [
    tool(in_stock, "How many pieces are left of an item", item={"enum": list(STOCK)}),
    tool(delivery, "How many days a parcel takes", country={"enum": list(DAYS)}),
]


class Chat:
    """A conversation, in `messages`; `usage` has the server's count of tokens for each request."""

    def __init__(self, url: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none")
        self.messages: list[Any] = [{"role": "system", "content": "You sell camping gear."}]
        self.usage: list[Any] = []

    def say(self, text: str, tool_choice: Any = "auto", **options: Any) -> str:
        """The answer to `text`, after as many tool calls as the model wants to make."""
        self.messages.append({"role": "user", "content": text})
        for _ in range(MAX_ROUNDS):
            message = self._complete(tool_choice, **options)
            if not message.tool_calls:
                break
            self.messages += [self._run(call) for call in message.tool_calls]
            tool_choice = "auto"
        return message.content or ""

    def _complete(self, tool_choice: Any, **options: Any) -> Any:
        # The tools are part of the prompt: it is found in the cache while they stay the same, and
        # with "none", or a function's name, SGLang leaves some out.
        answer = self._client.chat.completions.create(
            model="default",
            messages=self.messages,
            tools=TOOLS,
            tool_choice=tool_choice,
            parallel_tool_calls=False,
            max_tokens=96,
            temperature=0,
            **options,
        )
        self.usage.append(answer.usage)
        message = answer.choices[0].message
        self.messages.append(message.model_dump(exclude_none=True))
        return message

    def _run(self, call: Any) -> dict[str, str]:
        result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        return {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}


def main(argv: Sequence[str] | None = None) -> Chat:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    chat = Chat(parser.parse_args(argv).url)
    for question in QUESTIONS:
        chat.say(question, tool_choice="required")
    # Qualities share no KV: this prompt is computed anew, once.
    chat.say("Sum up what I ordered.", extra_headers={"X-DiffXKV-Quality": "lossless"})

    for message in chat.messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        said = [f"{call['name']}({call['arguments']})" for call in calls]
        print(f"{message['role']:>9}: {message.get('content') or ', '.join(said)}")
    for number, usage in enumerate(chat.usage, 1):
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        print(f"request {number}: {cached} of {usage.prompt_tokens} prompt tokens cached")
    return chat


if __name__ == "__main__":
    main()
