"""PyTorch's flash attention in bfloat16 at the shapes of packed_attention.cu: kernel time by events, the L2 cache flushed before each run."""

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

RUNS = 30
flushed = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
for batch, tokens in ((1, 131072), (1, 32768), (8, 32768)):
    q = torch.randn(batch, 8, 4, 128, device="cuda", dtype=torch.bfloat16)  # four query heads a KV head
    k = torch.randn(batch, 8, tokens, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    times = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for i in range(RUNS):
            flushed.fill_(i)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            functional.scaled_dot_product_attention(q, k, v)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    print(f"{tokens} tokens, batch {batch}, 32/8 heads of 128: {sorted(times)[RUNS // 2]:.4f} ms")
