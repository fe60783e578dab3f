"""By which names files are taken for images."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""A sample's images. Where it has none of these, `scan.images_of` also takes other formats and compound extensions."""
DECODED_EXTENSIONS = (*IMAGE_EXTENSIONS, "jfif", "jpe", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "npy")
"""Shards hold these as they are: data workers decode them."""
CONVERTED_EXTENSIONS = ("heic", "heif")
"""Building shards converts these to PNG."""
ALL_IMAGE_EXTENSIONS = (*DECODED_EXTENSIONS, *CONVERTED_EXTENSIONS)
