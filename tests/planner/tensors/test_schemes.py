"""What devices compute in, and the reasons why not."""

from __future__ import annotations

import msgspec
import pytest

from edgeq.errors import UsageError
from edgeq.planner.tensors.schemes import activations_of, choose_backend, schemes_for
from edgeq.profiles.device import Software
from edgeq.profiles.loader import load_profile


def test_a_laptop_tries_integers_and_keeps_floats() -> None:
    laptop = load_profile("laptop-cpu")
    backend = choose_backend(laptop, None)
    assert backend.name == "onnxruntime-cpu"
    assert schemes_for(laptop, backend, "auto") == ("int8-static", "int8-dynamic", "fp32")
    assert schemes_for(laptop, backend, "int8") == ("int8-static", "int8-dynamic")
    assert activations_of(laptop, backend) == "u8"


def test_arm_and_tensorrt_take_signed_activations() -> None:
    pi, orin = load_profile("raspberry-pi-5"), load_profile("jetson-orin")
    assert activations_of(pi, choose_backend(pi, None)) == "s8"
    backend = choose_backend(orin, None)
    assert backend.on_gpu
    assert activations_of(orin, backend) == "s8"
    assert schemes_for(orin, backend, "auto")[0] == "int8-static"


def test_fp8_on_orin_is_refused_with_the_reason() -> None:
    orin = load_profile("jetson-orin")
    with pytest.raises(UsageError, match=r"FP8 needs compute capability 8\.9, its GPU has 8\.7"):
        schemes_for(orin, choose_backend(orin, None), "fp8")
    thor = load_profile("jetson-thor")
    assert schemes_for(thor, choose_backend(thor, None), "fp8") == ("fp8",)


def test_bf16_is_for_tensorrt_from_ampere_on() -> None:
    orin, laptop = load_profile("jetson-orin"), load_profile("laptop-cpu")
    assert schemes_for(orin, choose_backend(orin, None), "bf16") == ("bf16",)
    assert "bf16" not in schemes_for(orin, choose_backend(orin, None), "auto")
    with pytest.raises(UsageError, match="CUDA kernels lack BF16 for many operators, and TensorRT has it"):
        schemes_for(orin, choose_backend(orin, "onnxruntime-cuda"), "bf16")
    with pytest.raises(UsageError, match=r"laptop-cpu cannot run bf16.*ONNX Runtime's CPU kernels lack BF16"):
        schemes_for(laptop, choose_backend(laptop, None), "bf16")
    rtx = load_profile("laptop-rtx")
    assert rtx.gpu is not None
    backend = choose_backend(rtx, "tensorrt-rtx")
    turing = msgspec.structs.replace(rtx, gpu=msgspec.structs.replace(rtx.gpu, compute_capability="7.5"))
    fewer = msgspec.structs.replace(backend, precisions=("fp32", "fp16", "int8"))
    with pytest.raises(UsageError, match=r"BF16 needs compute capability 8\.0, its GPU has 7\.5"):
        schemes_for(turing, fewer, "bf16")


def test_what_a_cpu_cannot_do_is_refused_with_the_reason() -> None:
    laptop = load_profile("laptop-cpu")
    backend = choose_backend(laptop, None)
    with pytest.raises(UsageError, match="computes FP16 in FP32"):
        schemes_for(laptop, backend, "fp16")


def test_backends_that_a_device_has_not() -> None:
    laptop = load_profile("laptop-cpu")
    with pytest.raises(UsageError, match=r"no backend 'tensorrt'.*onnxruntime-cpu"):
        choose_backend(laptop, "tensorrt")
    bare = msgspec.structs.replace(laptop, backends=tuple(b for b in laptop.backends if b.runs_gguf))
    with pytest.raises(UsageError, match="no backend for models that are called with arrays"):
        choose_backend(bare, None)


def test_tensorrt_that_is_too_old_is_refused_with_what_works() -> None:
    xavier = load_profile("jetson-xavier-nx")
    with pytest.raises(UsageError, match=r"has TensorRT 8\.5\.2 at most, and edgeq needs 10\.3") as caught:
        choose_backend(xavier, None)
    assert "--backend onnxruntime-cpu" in caught.value.remedy
    assert choose_backend(xavier, "onnxruntime-cpu").name == "onnxruntime-cpu"
    for version in ("10", "odd", "11.0"):
        own = msgspec.structs.replace(xavier, software=(Software(tensorrt=version),))
        assert choose_backend(own, None).name == "tensorrt"
