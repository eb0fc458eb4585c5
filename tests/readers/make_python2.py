"""Writes python2-0.pkl, python2-1.pkl and python2-2.pkl, one a protocol, as CIFAR-10's batches were written: with
cPickle and numpy of Python 2.7.

    python2.7 -m pip install numpy==1.16.6
    python2.7 tests/readers/make_python2.py
"""

import os

import cPickle
import numpy

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    batch = {
        "data": (numpy.arange(256).reshape(8, 32) * 7 % 256).astype("uint8"),
        "labels": [6, 9, 300, -1, 2**40, 70000, 0, 1],
        "batch_label": "training batch 1 of 5",
        "filenames": ["leptodactylus_s_000004.png", "it's.png", '"\\\n\t\r\x00\xff.png'],
        "mean": numpy.arange(6.0).reshape(2, 3).T / 4,  # in Fortran's order
        "scalar": numpy.float32(1.5),
        "more": (b"caf\xe9\n\\".decode("latin-1"), None, True, 0.1, {}, (), (1,)),
    }
    for protocol in range(3):
        with open(os.path.join(HERE, "python2-" + str(protocol) + ".pkl"), "wb") as file:
            file.write(cPickle.dumps(batch, protocol))


if __name__ == "__main__":
    main()
