"""Text in and out: tokenizers, chat templates, incremental detokenising, stop strings."""

from ssd_jax.text.chat_template import render_chat as render_chat
from ssd_jax.text.detokenizer import Detokenizer as Detokenizer
from ssd_jax.text.stop_strings import StopMatcher as StopMatcher
from ssd_jax.text.stream import TextDelta as TextDelta
from ssd_jax.text.stream import TextStream as TextStream
from ssd_jax.text.tokenizer import Tokenizer as Tokenizer
from ssd_jax.text.tokenizer import load_tokenizer as load_tokenizer
