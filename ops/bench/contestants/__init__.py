"""The sides of `bench engine`, a process each: one JSON line in, one out.

← {"ready": true, "about": {…}}                                   once loaded
→ {"prompts": [[ids], …], "max_tokens": n}                         a burst, sent at once
← {"wall_s", "num_tokens", "tokens": [[ids], …], "ttft_s": [per request], "tpot_s": [per request]}

Their arguments: MODEL_DIR DTYPE THREADS CACHE, where CACHE says whether prefixes are shared (`cache`) or not (`plain`).
"""
