# SPDX-License-Identifier: Apache-2.0
"""Every place where stock SGLang's behaviour is changed, imported as `sglang_diffxkv.patches`.

One file a hook; each has `install()`, which registers its hooks with SGLang's HookRegistry.
"""
