"""Training data of three kinds: bytes of text, text through a tokenizer, and files of tokens.

corpus.py                    what every kind offers: the batch of a step, which follows from seed and step alone
windows.py holdout.py        where the sequences of a step begin, and what is for validation
sources.py                   which files, and their text
byte_text.py                 kind bytes
token_files.py stream.py     kind tokens: files that are mapped, never read as a whole
tokenizer.py token_cache.py  kind text: tokenized once, from then on as kind tokens
opening.py                   any of them, from plain settings

Beside them images with labels, in memory:

images.py                    a set by its name
mnist.py cifar10.py          the official format of each
official.py cache_folder.py  the files of others: their addresses and checksums, and where they are kept
"""

from .byte_text import ByteCorpus as ByteCorpus
from .byte_text import byte_corpus as byte_corpus
from .corpus import Corpus as Corpus
from .images import ImageData as ImageData
from .images import ImageSet as ImageSet
from .images import load_images as load_images
from .opening import Kind as Kind
from .opening import open_corpus as open_corpus
from .sources import stdlib_sources as stdlib_sources
from .token_files import TokenCorpus as TokenCorpus
from .token_files import TokenDtype as TokenDtype
from .windows import Split as Split
