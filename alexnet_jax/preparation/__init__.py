"""Section 2 of the paper, once before training: every image at 256×256, the mean image, the RGB covariance.

The result is a TFDS data set in ArrayRecord. `local.prepare` makes it on one machine and `beam.prepare` on many, with
the same bytes for any number of workers. `sources` finds the images, `shards` writes the files, `statistics` sums them.
"""
