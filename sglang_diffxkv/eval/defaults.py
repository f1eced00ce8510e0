# SPDX-License-Identifier: Apache-2.0
"""What is evaluated unless a command line says otherwise: names, with commas."""

POLICIES = "full,lossless,int8,k8v4,k4v8,int4,int2,streaming,snapkv,diffkv,xkv,diffxkv"
TASKS = "niah_single,niah_multikey,kv_lookup,vt"
DOCUMENT_TASKS = "half,grow,shared"
