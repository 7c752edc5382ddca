"""Loads on a block device or a folder: one fio job each, with what fio measured or verified.

Loads are small: two emulated guests share the host's cores.
"""

import json

from labkit.guest import Failed


def fio(guest, target, seconds_max=180, **options):
    """Runs one job to its end and answers fio's figures for it. Raises Failed when it verified something wrong."""
    text = guest.run(command(target, **options), seconds_max)
    try:
        job = json.loads(text[text.index("{"):])["jobs"][0]
    except (ValueError, KeyError) as error:
        raise Failed(f"fio said no JSON: {text[-300:]!r}") from error
    if job["error"] != 0:
        raise Failed(f"fio ended with error {job['error']}")
    return job


def verified(guest, target, megabytes, seconds_max=300, **options):
    """Writes random blocks, each with its own checksum, and reads all of them back."""
    options = {"rw": "randwrite", "size": f"{megabytes}m", "verify": "crc32c", "do_verify": 1, "verify_fatal": 1, **options}
    return fio(guest, target, seconds_max, **options)


def command(target, **options):
    """The words that run one job, for a guest's shell."""
    ready = {"direct": 1, "ioengine": "io_uring", "bs": "4k", "iodepth": 8, "randseed": 7, **options}
    words = " ".join(f"--{name}={value}" for name, value in ready.items())
    return f"fio --name=load --filename={target} --output-format=json --eta=never {words}"


def writes_per_second(job):
    return job["write"]["iops"]
