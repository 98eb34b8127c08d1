"""Training data of three kinds: bytes of text, text through a tokenizer, and files of tokens.

corpus.py                    what every kind offers: the batch of a step, which follows from seed and step alone
windows.py holdout.py        where the sequences of a step begin, and what is for validation
sources.py                   which files, and their text
byte_text.py                 kind bytes
token_files.py stream.py     kind tokens: files that are mapped, never read as a whole
tokenizer.py token_cache.py  kind text: tokenized once, from then on as kind tokens
opening.py                   any of them, from plain settings
"""

from .byte_text import ByteCorpus as ByteCorpus
from .byte_text import byte_corpus as byte_corpus
from .corpus import Corpus as Corpus
from .opening import Kind as Kind
from .opening import open_corpus as open_corpus
from .sources import stdlib_sources as stdlib_sources
from .token_files import TokenCorpus as TokenCorpus
from .token_files import TokenDtype as TokenDtype
from .windows import Split as Split
