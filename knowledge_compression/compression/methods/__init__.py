"""The compressions: one short file each, mirrored by ``conf/compression/``."""
