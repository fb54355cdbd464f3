"""The sides of `bench engine`, a process each: one JSON line in, one out.

← {"ready": true, "about": {…}}                                   once loaded
→ {"prompts": [[ids], …], "max_tokens": n}                         a burst, sent at once
← {"wall_s", "num_tokens", "ttft_s": [per request], "tpot_s": [per request]}
"""
