# SPDX-License-Identifier: Apache-2.0
"""The KV pool: page directory, frame arena, raw pages, sealing, and SGLang's pool and allocator."""
