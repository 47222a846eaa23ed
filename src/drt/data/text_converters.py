"""HTML and PDF to plain text, by the libraries of the extra `documents`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

from drt.errors import DRTError


class ConversionError(DRTError):
    """A document that cannot be converted to text."""


def html_text(path: Path, content: bytes) -> str:
    """The text of an HTML page, laid out as a browser shows it: without scripts and styles, with lists and tables.

    A page is read as UTF-8 where it is, else in the encoding that it declares, else as Latin-1.

    Args:
        path: of the file, for messages.
        content: of the file.

    Raises:
        ConversionError: the extra is not installed, or the page is empty.
    """
    try:
        from inscriptis import Inscriptis
        from lxml.etree import LxmlError
        from lxml.html import HTMLParser, document_fromstring
    except ImportError as error:
        raise _not_installed(path, "HTML", error) from error
    try:
        page = document_fromstring(
            content, parser=HTMLParser(encoding="utf-8" if _is_utf8(content) else None)
        )
        text = Inscriptis(page).get_text()
    except (LxmlError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: expected an HTML page: {error}") from error
    return str(text)


def pdf_text(path: Path, content: bytes) -> str:
    """The text of a PDF, page by page.

    Args:
        path: of the file, for messages.
        content: of the file.

    Raises:
        ConversionError: the extra is not installed, the file is damaged or encrypted, or its pages are pictures.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise _not_installed(path, "PDF", error) from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of every oddity that it has put right
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(content)).pages]
    # The library trusts that objects of a file are of the kinds that they should be.
    except (
        PyPdfError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ConversionError(f"{path}: the PDF cannot be read: {error}") from error
    text = "\n\n".join(pages)
    if not text.strip():
        raise ConversionError(
            f"{path}: expected a PDF with text, got pictures only; ocrmypdf makes text of them"
        )
    return text.encode("utf-8", "replace").decode()  # fonts may name half a surrogate pair


CONVERTERS: dict[str, Callable[[Path, bytes], str]] = {
    ".html": html_text,
    ".htm": html_text,
    ".xhtml": html_text,
    ".pdf": pdf_text,
}


def _not_installed(path: Path, kind: str, error: ImportError) -> ConversionError:
    return ConversionError(
        f'{path}: {kind} is converted to text by an extra: pip install "drt-lm[documents]" ({error})'
    )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
