"""Combinations of adapters with other settings that cannot work (`config/compatibility.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from vlmvqa.config.compatibility import RunRequest, missing

INSTALL = "install it with: pip install 'vlmvqa[adapters]'"


def conflicts(r: RunRequest) -> Iterator[str]:
    """Yield an error message for each."""
    bits, dtype = r.adapt.bits, r.model.dtype
    if missing("peft"):
        yield f"adapt={r.adapt.method} needs peft; {INSTALL}"
    if bits and missing("bitsandbytes"):
        yield f"adapt={r.adapt.method} needs bitsandbytes; {INSTALL}"
    if bits and r.dist.strategy in ("fsdp", "zero3"):
        yield f"adapt.bits={bits}: {r.dist.strategy} cannot shard weights of 4 bits; use dist=ddp or zero2"
    if r.dist.strategy == "fsdp" and dtype != "float32":
        yield (
            f"model.dtype={dtype} under fsdp, which shards a block in one type, and adapters are float32; "
            "set model.dtype=float32 (trainer.bf16=true still computes in bfloat16)"
        )
    # 4-bit layers return the type of their input, and autocast joins no bfloat16 under fp16.
    if bits and r.trainer.get("fp16") and dtype == "bfloat16":
        yield "trainer.fp16=true fails with bfloat16 weights next to 4-bit ones; set model.dtype=float32 or float16"
    if bits and r.adapt.compute_dtype == "bfloat16" and not r.bf16_works:
        yield "adapt.compute_dtype=bfloat16: this card does not compute in bfloat16; use adapt.compute_dtype=float16"
    if r.cached and any(target.startswith(("vision", "*")) for target in r.adapt.targets):
        yield "data.feature_cache: an encoder with adapters runs in every step; leave the cache out"
