# SPDX-License-Identifier: Apache-2.0
"""Where the configuration comes from, and what a user reads when it is wrong."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_diffxkv.config import ENV_VAR, ConfigError, DiffXKVConfig, Tiers, load_config
from sglang_diffxkv.kernels.layout import FORMATS


def test_defaults() -> None:
    config = load_config(None, {})
    assert config == DiffXKVConfig()
    assert (config.policy, config.window, config.sink) == ("diffxkv", 64, 4)
    assert (config.alpha_high, config.alpha_low) == (1.0, 0.02)
    assert config.tiers.formats == (FORMATS["K8V4"], FORMATS["K4V2"])
    assert config.memory_bytes is None and config.layer_caps is None


def test_flag_wins_over_environment_wins_over_defaults() -> None:
    env = {ENV_VAR: '{"window": 7, "sink": 1}'}
    assert load_config(None, env) == DiffXKVConfig(window=7, sink=1)
    assert load_config('{"window": 8}', env) == DiffXKVConfig(window=8)
    assert load_config(None, {ENV_VAR: ""}) == DiffXKVConfig()


def test_file_reads_like_text(tmp_path: Path) -> None:
    path = tmp_path / "diffxkv.json"
    path.write_text('{"policy": "lossless"}')
    assert load_config(str(path), {}) == load_config(path.read_text(), {})
    assert load_config(None, {ENV_VAR: str(path)}).policy == "lossless"


@pytest.mark.parametrize(
    ("written", "expected"),
    [(2_000_000, 2_000_000), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29)],
)
def test_memory_sizes(written: int | str, expected: int) -> None:
    assert load_config(json.dumps({"memory_bytes": written}), {}).memory_bytes == expected


FORMAT_PAIRS = [
    (high, low)
    for high in FORMATS
    for low in FORMATS
    if high == "raw"
    or (
        low != "raw"
        and FORMATS[low].key_bits + FORMATS[low].value_bits
        <= FORMATS[high].key_bits + FORMATS[high].value_bits
    )
]
SHARES = st.floats(0, 1, exclude_min=True)


@given(
    memory=st.none() | st.integers(1, 1 << 50),
    window=st.integers(0, 1 << 20),
    sink=st.integers(0, 64),
    alphas=st.tuples(st.floats(0, 1), st.floats(1, 10)),
    tiers=st.sampled_from(FORMAT_PAIRS),
    caps=st.none() | SHARES | st.lists(SHARES, min_size=1, max_size=5),
)
def test_json_round_trip(
    memory: int | None,
    window: int,
    sink: int,
    alphas: tuple[float, float],
    tiers: tuple[str, str],
    caps: float | list[float] | None,
) -> None:
    values = {
        "memory_bytes": memory,
        "window": window,
        "sink": sink,
        "alpha_low": alphas[0],
        "alpha_high": alphas[1],
        "tiers": {"high": tiers[0], "low": tiers[1]},
        "layer_caps": caps,
    }
    config = load_config(json.dumps(values), {})
    assert load_config(config.to_json(), {}) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.tiers == Tiers(high=tiers[0], low=tiers[1])
    assert json.loads(config.to_json()).items() >= values.items()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"windo": 3}', ["windo", "did you mean 'window'"]),
        ('{"xyz": 3}', ["xyz", "known keys: policy"]),
        ('{"tiers": {"hi": "K8V4"}}', ["hi", "did you mean 'high'"]),
        ('{"window": "3"}', ["window", "'3'", "whole number"]),
        ('{"window": 1.5}', ["window", "1.5", "whole number"]),
        ('{"window": true}', ["window", "True", "whole number"]),
        ('{"window": -1}', ["window", "-1", "at least 0"]),
        ('{"sink": 65}', ["sink", "65", "0 to 64"]),
        ('{"alpha_low": 1.1}', ["alpha_low", "1.1", "0 to 1"]),
        ('{"alpha_low": NaN}', ["alpha_low", "nan"]),
        ('{"alpha_high": Infinity}', ["alpha_high", "inf"]),
        ('{"alpha_high": 0.01}', ["alpha_high (0.01)", "at least alpha_low (0.02)"]),
        ('{"tiers": {"high": "K9V9"}}', ["tiers.high", "K9V9", "K8V4"]),
        ('{"tiers": {"low": "K8V8"}}', ["low (K8V8)", "more bytes than high (K8V4)"]),
        ('{"tiers": {"low": "raw"}}', ["low (raw)", "more bytes than high (K8V4)"]),
        ('{"layer_caps": 0}', ["layer_caps", "above 0 and up to 1"]),
        ('{"layer_caps": [0.5, 2]}', ["layer_caps", "one per layer"]),
        ('{"raw_share": 0.95}', ["raw_share", "0.95", "up to 0.9"]),
        ('{"score_queries": 0}', ["score_queries", "at least 1"]),
        ('{"memory_bytes": 0}', ["memory_bytes", "positive", "512MiB"]),
        ('{"memory_bytes": "1 zebi"}', ["memory_bytes", "1 zebi", "512MiB"]),
        ('{"policy": 3}', ["policy", "3", "name of a policy"]),
        ('{"policy": ', ["not valid JSON"]),
        ("[1]", ["neither JSON text", "nor a file"]),
        ("/no/such/file", ["/no/such/file", "No such file"]),
    ],
)
@pytest.mark.parametrize("origin", ["--diffxkv-config", ENV_VAR])
def test_mistakes_are_refused_in_one_clear_line(origin: str, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {ENV_VAR: text}) if origin == ENV_VAR else load_config(text, {})
    message = str(caught.value)
    assert message.startswith(f"{origin}: ")
    assert "\n" not in message and len(message) < 300
    for part in parts:
        assert part in message


def test_long_values_are_cut_short() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(json.dumps({"window": "9" * 1000}), {})
    assert len(str(caught.value)) < 300


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        DiffXKVConfig().window = 3  # type: ignore[misc]
