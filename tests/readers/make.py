"""Writes tensorflow.tfrecord with TensorFlow itself: an image as TFDS's downsampled_imagenet has it, features of every
kind, and an Example without any.

    python -m venv VENV; VENV/bin/pip install tensorflow-cpu==2.21.0
    VENV/bin/python tests/readers/make.py
"""

from pathlib import Path

import tensorflow as tf

HERE = Path(__file__).resolve().parent


def main():
    image = tf.reshape(tf.cast(tf.range(2 * 3 * 3) * 13, tf.uint8), (2, 3, 3))
    kinds = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_png(image).numpy()])),
        "bytes": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"", b"\x00\xff", b"two" * 50])),
        "floats": tf.train.Feature(float_list=tf.train.FloatList(value=[1.5, -2.25, float("inf"), 0.1])),
        "ints": tf.train.Feature(int64_list=tf.train.Int64List(value=[0, 1, -1, 300, 2**63 - 1, -(2**63)])),
        "empty list": tf.train.Feature(int64_list=tf.train.Int64List()),
        "nothing": tf.train.Feature(),
        "café": tf.train.Feature(int64_list=tf.train.Int64List(value=[7])),
    }
    with tf.io.TFRecordWriter(str(HERE / "tensorflow.tfrecord")) as file:
        for names in (("image",), [name for name in kinds if name != "image"], ()):
            features = tf.train.Features(feature={name: kinds[name] for name in names})
            file.write(tf.train.Example(features=features).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
