# SPDX-License-Identifier: Apache-2.0
"""/start_profile of a CPU server: what only a GPU has is refused, on our backend alone."""

from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from sglang.srt.managers.io_struct import ProfileReq

from sglang_diffxkv.patches import profiling


@pytest.mark.parametrize("activities", [["MEM"], ["CPU", "CUDA_PROFILER"], ["RPD"], ["cpu"]])
def test_what_needs_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, activities: list[str]
) -> None:
    req = ProfileReq(activities=activities)
    for device, active in (("cuda", True), ("cpu", False), ("cpu", True)):
        monkeypatch.setattr(profiling, "get_device", lambda at=device: SimpleNamespace(device=at))
        monkeypatch.setattr(profiling, "is_active", lambda on=active: on)
        if device == "cpu" and active:
            with pytest.raises(HTTPException, match="need a GPU") as refused:
                profiling._check_activities(None, req)
            assert refused.value.status_code == 400
        else:
            profiling._check_activities(None, req)


@pytest.mark.parametrize("req", [None, ProfileReq(), ProfileReq(activities=["CPU", "GPU"])])
def test_the_rest_is_profiled(monkeypatch: pytest.MonkeyPatch, req: ProfileReq | None) -> None:
    monkeypatch.setattr(profiling, "get_device", lambda: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(profiling, "is_active", lambda: True)
    profiling._check_activities(None, req)
