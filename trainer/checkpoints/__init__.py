"""A run's checkpoints: verified by checksum, independent of world size and ZeRO stage, written asynchronously.

RUN/checkpoints/step-00001000/            renamed to this name only when every file in it is on disk
    manifest.json                         progress, recipe, versions, parameters, sizes and checksums of the files
    rank-00000.safetensors, ...           each rank's slices of the parameters, and its buffers
RUN/checkpoints/newest                    the name of the newest complete one

A checkpoint holds the fp32 master weight and the optimizer states of every trained parameter, by the optimizer's names,
flattened and split at the boundaries of the ranks' shards. Any world size and ZeRO stage can therefore load what any
other wrote, by intersecting slices; the model's own weights are the master weights rounded. Frozen parameters are saved
once, in the model's precision. Each rank saves its own buffers (see `buffers`). Nothing is pickled.
"""
