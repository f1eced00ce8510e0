# SPDX-License-Identifier: Apache-2.0
"""An importance model, and a plan for reproducible serving, from a set of prompts.

The model reads the prompts twice, and what it needs of them is learnt. Then a real server takes
them in, and sketches the importances of their pages when it seals them; the plan it then solves is
the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from requests import RequestException

from sglang_diffxkv.calibrate.importance.learn import learn_importance, library_texts
from sglang_diffxkv.calibrate.ranks import Files, check_output, write_files
from sglang_diffxkv.client import Client, Prompt
from sglang_diffxkv.config import ConfigError, DiffXKVConfig, load_config
from sglang_diffxkv.eval.ask import WARM_TOKENS
from sglang_diffxkv.eval.model import Model, load_model
from sglang_diffxkv.eval.questions.prompts import make_cells
from sglang_diffxkv.eval.tasks.registry import choose_suite, is_bundled
from sglang_diffxkv.launch import ServerError, ServerProcess, default_device
from sglang_diffxkv.policy.importance.file import save_importance

_TASKS = ["niah_multikey", "kv_lookup", "vt", "recall"]
"""Synthetic prompts, where no file is given."""
_ROOM_TOKENS = 65536
"""That the server's pool is made for, in uncompressed bytes, where --config gives none."""
_SETTLE_S = 60.0


def run_calibrate(args: argparse.Namespace) -> None:
    """Calibrate."""
    model, device = load_model(args.model), args.device or default_device()
    output = args.output.expanduser()
    check_output(output, args.ranks, model.kv_heads)
    # In one file system with it.
    with tempfile.TemporaryDirectory(prefix=".diffxkv-calibrate-", dir=output.parent) as folder:
        files = Files.of(Path(folder) / "plan.json")
        config, prompts = _config(args, model, files), _prompts(args, model)
        learnt = learn_importance(model, _texts(args, model, prompts), device)
        save_importance(learnt.model, files.importance)
        found = calibrate(args.model, prompts, config, device)
        write_files(files, Files.of(output), args.ranks, model, config, found["target"])
    print(f"importance: {learnt.explained:.0%} of the variance of log T on texts held out")
    print(summary(found, config, Files.of(output)))


def calibrate(
    model: Path, prompts: list[Prompt], config: DiffXKVConfig, device: str
) -> dict[str, Any]:
    """Serve `model` with `config`, whose `save_plan` is written, on prompts of text or token ids.

    Returns:
        The plan as `/diffxkv/stats` shows it.

    Raises:
        ServerError: the server did not start.
        ConfigError: no prompt was long enough for a page to be sealed.
    """
    options: list[object] = ["--model-path", model, "--device", device]
    options += ["--attention-backend", "diffxkv", "--diffxkv-config", config.to_json()]
    if device == "cpu":
        options += ["--sleep-on-idle"]
    with (
        tempfile.TemporaryDirectory(prefix="diffxkv-calibrate-") as folder,
        ServerProcess(*options, log=Path(folder) / "server.log") as server,
    ):
        try:
            for number, prompt in enumerate(prompts, 1):
                # A page is sealed once a later step has scored it.
                server.generate(prompt, max_new_tokens=WARM_TOKENS)
                print(f"\r{number} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            return _settled_plan(server)
        except RequestException as error:
            raise ServerError(f"{error}\n{server.log_tail()}") from error


def _settled_plan(client: Client) -> dict[str, Any]:
    """The plan once it has all pages in it: a server at rest solves and saves it."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        stats = client.stats()
        plan: dict[str, Any] = stats["plan"]
        if not stats["counters"]["sealed"]:
            raise ConfigError("no prompt was long enough for a page to be sealed: give longer ones")
        if plan["number"] and not plan["unsaved_pages"]:
            return plan
        time.sleep(0.5)
    raise ConfigError(f"the server solved no plan within {_SETTLE_S:.0f} s")


def summary(plan: dict[str, Any], config: DiffXKVConfig, output: Files) -> str:
    """A table of budgets by layer, and how to serve with them."""
    layers = plan["qualities"]["balanced"]
    lines = [f"target {plan['target']:g}", "layer  bytes/page  retention  alpha_high  alpha_low"]
    columns = zip(*(layers[key] for key in _COLUMNS), strict=True)
    for number, (nbytes, retention, high, low) in enumerate(columns):
        lines.append(f"{number:5}  {nbytes:10,.0f}  {retention:9.3f}  {high:10.3g}  {low:9.3g}")
    use = json.loads(config.to_json())
    default = json.loads(DiffXKVConfig().to_json())
    use = {key: value for key, value in use.items() if value != default[key]}
    use |= {"target": plan["target"], "plan": str(output.plan), "learn_share": 0}
    use["importance"] = str(output.importance)
    for key in ("save_plan", "memory_bytes"):
        use.pop(key, None)
    return "\n".join([*lines, f"serve with --diffxkv-config '{json.dumps(use)}'"])


_COLUMNS = ("page_bytes", "retention", "alpha_high", "alpha_low")


def _config(args: argparse.Namespace, model: Model, files: Files) -> DiffXKVConfig:
    """What to learn with: `files` is where the server reads and writes."""
    own: dict[str, object] = {"policy": "diffxkv", "learn_share": 1.0}
    own |= {"save_plan": str(files.plan), "importance": str(files.importance), "plan": None}
    if args.target is not None:
        own["target"] = args.target
    room = {"memory_bytes": _ROOM_TOKENS * model.token_bytes}
    try:
        given = json.loads(args.config)
        return load_config(json.dumps(room | given | own), {})
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--config is not a JSON object: {error}") from None


def _prompts(args: argparse.Namespace, model: Model) -> list[Prompt]:
    if args.prompts is not None:
        return list(read_prompts(args.prompts))
    suite = choose_suite(args.model)
    cells = make_cells(model.tokenizer, _TASKS, [args.length], args.samples, seed=7, suite=suite)
    return [prompt.ids for cell in cells for prompt in cell.prompts]


def _texts(
    args: argparse.Namespace, model: Model, prompts: list[Prompt]
) -> Sequence[Sequence[int]]:
    """Token ids that importance is learnt from."""
    tokenize = model.tokenizer
    ids = [tokenize(x, verbose=False).input_ids if isinstance(x, str) else x for x in prompts]
    known = args.prompts is not None or is_bundled(args.model)
    return ids if known else [*ids, *library_texts(model)]


def read_prompts(path: Path) -> Iterator[str]:
    """Prompts of a file, one per line that is not empty.

    Raises:
        ConfigError: no such file, or a line of JSON without a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield line
            continue
        try:
            found = json.loads(line)
            prompt = found["prompt"] if "prompt" in found else found["text"]
        except (ValueError, KeyError):
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(
                f'{path}, line {number}: not a JSON object with a "prompt" or a "text"'
            )
        yield prompt
