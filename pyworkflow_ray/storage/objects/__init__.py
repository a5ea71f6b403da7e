"""Runs in a bucket: the storage of a cluster whose nodes share nothing else.

`slots` is the format (pure), `bucket` the store's calls, `commit` and `journal` the fence, `leases` who lives,
`storage` what the runtime calls. Needs obstore.
"""
