# SPDX-License-Identifier: Apache-2.0
"""What `bench/results/quantizers.md` is made of."""

import pytest
import torch
from transformers import AutoTokenizer

from bench.accuracy.answers import Reader
from bench.accuracy.fake_quantization import Side, quantized, token_bytes
from bench.accuracy.quantizer_report import KL_FLOOR, Sample, summarize
from bench.accuracy.quantizers import Outputs
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.questions.prompts import make_cells
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, make_layout
from sglang_diffxkv.kernels.pack.quantize import CLIP
from tests.support.torch_pack import dequantize_rows, quantize_rows


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_shipped_way_is_what_is_shipped(bits):
    x = rows(bits, 2, 37, 80)
    packed, meta = quantize_rows(x.flatten(0, 1), bits)
    expected = dequantize_rows(packed, meta, bits).view(x.shape)
    assert torch.equal(quantized(x, bits, Side(CLIP[bits])), expected)
    rotated = quantized(rotate(x), bits, Side(CLIP[bits]))
    assert torch.equal(quantized(x, bits, Side(CLIP[bits], rotated=True)), rotate(rotated))


@pytest.mark.parametrize("bits", [2, 4])
def test_ranges_of_groups_and_channels(bits):
    x = rows(bits, 3, 2 * PAGE_TOKENS, 64)
    halves = [quantized(half, bits, Side()) for half in x.chunk(2, -1)]
    assert torch.equal(quantized(x, bits, Side(groups=2)), torch.cat(halves, -1))
    pages = [quantized(page.mT, bits, Side()).mT for page in x.split(PAGE_TOKENS, -2)]
    assert torch.equal(quantized(x, bits, Side(by_channel=True)), torch.cat(pages, -2))
    errors = [(quantized(x, bits, Side(clip)) - x).norm(dim=-1) for clip in (None, 1.0, 0.9, 0.5)]
    assert all((errors[0] <= other).all() for other in errors[1:])


@pytest.mark.parametrize("name", ["K8V4", "K4V2", "K2V2"])
def test_bytes(name):
    tier = FORMATS[name]
    layout = make_layout(head_dim=64, num_kv_heads=2, raw_itemsize=2, high=tier, low=tier)
    plain = layout.token_bytes(tier)
    assert token_bytes(tier, Side(rotated=True), Side(0.5), 64) == plain
    assert token_bytes(tier, Side(groups=4), Side(groups=2), 64) == plain + 4 * 4
    # 64 fp16 pairs for the 64 tokens of a page: as many bytes as a pair per token
    assert token_bytes(tier, Side(by_channel=True), Side(), 64) == plain


def test_output_error():
    q, kv = rows(1, 3, 4, 150, 16), rows(2, 2, 3, 2, 150, 16)
    outputs = Outputs(q, kv)
    assert outputs.error(kv[..., :64, :]) < 1e-6
    assert outputs.error(kv[..., :64, :] * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)) > 0.01


def test_summary():
    samples = [Sample(0.1, 0.2, 0.3, kl, same) for kl, same in ((1e-4, True), (0.0, False))]
    found = summarize(samples)
    assert found.kl == pytest.approx(5e-5) and found.exact_match == 0.5
    assert found.kl_geometric == pytest.approx((1e-4 * KL_FLOOR) ** 0.5)
    assert summarize([Sample(0.1, 0.2, 0.3)]).kl is None


def test_answers_on_other_caches():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)
    (cell,) = make_cells(tokenizer, ["kv_lookup"], [300], 1, seed=4)
    reader = Reader(BUNDLED)
    prefill = reader.prefill(cell.prompts[0].ids)
    assert prefill.sealed == (len(cell.prompts[0].ids) - 64) // 64 * 64
    assert cell.prompts[0].question.answer in tokenizer.decode(prefill.answer)
    exact = prefill.kv[..., : prefill.sealed, :]
    same, other = reader.agreements(prefill, torch.stack([exact, torch.zeros_like(exact)]))
    assert same.same and abs(same.kl) < 1e-5
    assert not other.same and other.kl > 1
