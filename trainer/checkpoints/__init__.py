"""A run's checkpoints: verified, independent of the ranks that wrote them, written while training goes on.

RUN/checkpoints/step-00001000/            has its name only when every file in it is on disk
    manifest.json                         progress, recipe, versions, what is saved, sizes and checksums of the files
    rank-00000.safetensors, ...           each rank's slices of the parameters, and its buffers
RUN/checkpoints/newest                    the name of the newest complete one

Saved is the fp32 weight of every trained parameter and what its optimizer keeps with it, under the optimizer's names
for that, flattened and cut wherever the ranks' shares began and ended. So any number of ranks at any ZeRO stage reads
what any other wrote, by intersecting slices; the weights in the model's own precision are those rounded. Frozen
parameters are saved once, in the model's precision. Buffers are each rank's own (see `buffers`). Nothing is pickled.
"""
