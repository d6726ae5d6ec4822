"""Images (later other media) on their way from a request to the engine, but for processes and HTTP.

`settings` (limits), `pixels` (bytes of a file to RGB), `decoder` and `decoders` (the same in processes with a memory
limit), `sources` (data URLs and files), `fetch` (addresses), `memory` (preprocessed tensors in shared memory),
`places` (placeholders in prompts), `offline` (all of it within one process). The process itself is
`light_core.processes.media`; what the engine does with items is `light_core.engine.media`.
"""
