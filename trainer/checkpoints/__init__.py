"""A run's checkpoints: verified, independent of the ranks that wrote them, written while training goes on.

RUN/checkpoints/step-00001000/            has its name only when every file in it is on disk
    manifest.json                         sizes and checksums of the files, position, recipe, versions
    rank-00000.safetensors, ...           what each rank held of every parameter
RUN/checkpoints/newest                    the name of the newest complete one

What is saved is the fp32 weight of every parameter and AdamW's two moments of it, flattened, cut wherever the ranks'
shares began and ended. So any number of ranks at any ZeRO stage reads what any other wrote, by intersecting stretches;
the weights in the model's own precision are those rounded. Nothing is pickled.
"""
