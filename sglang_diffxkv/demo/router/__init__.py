# SPDX-License-Identifier: Apache-2.0
"""`sglang-diffxkv demo-router`: two replicas behind SGLang's router, and where requests hit."""
