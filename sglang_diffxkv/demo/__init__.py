# SPDX-License-Identifier: Apache-2.0
"""`sglang-diffxkv demo`: the same load on this pool and on stock SGLang's, in the same memory."""
