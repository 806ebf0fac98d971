"""Settings that cannot be combined with adapters: further rules for `config/compatibility.py`."""

from __future__ import annotations

from vlmvqa.config.compatibility import Conflicts, RunRequest, missing

INSTALL = "install it with: pip install 'vlmvqa[adapters]'"


def conflicts(r: RunRequest) -> Conflicts:
    """Return each condition under which adapters cannot work, and its error message."""
    bits, dtype, strategy = r.adapt.bits, r.model.dtype, r.dist.strategy
    return [
        (missing("peft"), f"adapt={r.adapt.method} needs peft; {INSTALL}"),
        (bits and missing("bitsandbytes"), f"adapt={r.adapt.method} needs bitsandbytes; {INSTALL}"),
        (
            bits and strategy in ("fsdp", "zero3"),
            f"adapt.bits={bits}: {strategy} cannot shard weights of 4 bits; use dist=ddp or zero2",
        ),
        (
            strategy == "fsdp" and dtype != "float32",
            f"model.dtype={dtype} under fsdp, which shards a block in one type, and adapters are float32; "
            "set model.dtype=float32 (trainer.bf16=true still computes in bfloat16)",
        ),
        # 4-bit layers return the type of their input, and autocast joins no bfloat16 under fp16.
        (
            bits and r.trainer.get("fp16") and dtype == "bfloat16",
            "trainer.fp16=true fails with bfloat16 weights next to 4-bit ones; set model.dtype=float32 or float16",
        ),
        (
            bits and r.adapt.compute_dtype == "bfloat16" and not r.bf16_works,
            "adapt.compute_dtype=bfloat16: this card does not compute in bfloat16; use adapt.compute_dtype=float16",
        ),
        (
            r.cached and any(target.startswith(("vision", "*")) for target in r.adapt.targets),
            "data.feature_cache: an encoder with adapters runs in every step; leave data.feature_cache out",
        ),
    ]
