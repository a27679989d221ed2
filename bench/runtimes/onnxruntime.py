"""The decoder that is measured: a bundle in ONNX Runtime, as :mod:`export.bundle.decoder` runs it."""

from export.bundle.decoder import Decoder as Decoder
from export.bundle.decoder import Ids as Ids
from export.bundle.decoder import Logits as Logits
from export.bundle.decoder import OrtDecoder as OrtDecoder
from export.bundle.decoder import check_context as check_context
from export.bundle.decoder import check_threads as check_threads
