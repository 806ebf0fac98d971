"""COCO's caption tokenizer in Python: lower-case Penn Treebank tokens without punctuation.

For English captions and answers the tokens equal those that pycocoevalcap gets from Stanford's tokenizer in Java:
clitics are separate tokens ("it 's", "ca n't"); hyphenated words, numbers and abbreviations are one token; other marks
are separate. Only these marks are dropped: . , : ; ? ! ... - -- ' '' ` ``. Brackets are kept, as "-lrb-" etc.: the
official list of dropped tokens has them in upper case, but the tokens are in lower case.

Two differences: Java reads the next caption to decide whether the period of a final letter ends a sentence ("vitamin
C."); here the next caption is assumed to begin with a capital. Java joins groups of digits separated by spaces as a
telephone number; here they are separate tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Abbreviations that keep their period: always, with a capital, before a number.
_ABBREVIATIONS = """
    adj adm adv ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col
    colo comdr conn corp cpl ct dak dec dept det dr drs e.g esq est etc ext feb fla fri ft ga gen gov hon i.e inc ind
    intl jan jos jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms mt neb
    nev nov oct okla penn pfc ph ph.d plc pres prof pte pty pvt rd rep reps rev rt sen sens sep sept seq sgt sq sr st
    ste supt tel tenn thu thurs treas tue tues univ va vs vt wed wis wm wyo
"""
_CAPITALISED = "Ark Del Ill La Mass Ore Pa Tex Wash"
_NUMBERED = "ca fig figs no nos op pp prop"
# The period of a letter ends a sentence before these words and at the end of the text: "vitamin C. The", "J. Smith".
_STARTS = """
    A After An At But He Her Here However If In It Many More One Our She Since Some That The Their Then There These They
    This We What When While You
"""


def _any(words: str) -> str:
    return "|".join(map(re.escape, words.split()))


_NO_DIGIT = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f\u2460-\u24ff"  # powers, fractions, circled digits
)
_LETTER = rf"[^\W\d_{_NO_DIGIT}]"
_ALNUM = rf"[^\W_{_NO_DIGIT}]"
_END = rf"(?!{_ALNUM})"
_HYPHENATED = rf"{_ALNUM}+(?:[-_\u2010\u2011]{_ALNUM}+)*"
_SHORT = rf"{_ALNUM}+(?:-{_ALNUM}+){{0,2}}"
_APOSTROPHE = r"['\u2019]"
_CLITIC = "s|m|d|ll|re|ve"
_ADDRESS = r"[^\s<>\"|()]*[^\s<>\"|().,;:!?'-]"

# At each position the first matching rule gives the token.
_RULES = (
    r"[a-z]+(?=[\s,]|$)",  # nearly every word; first for speed
    # <name@host>; <unk> or another tag; an address.
    r"<[\w.+-]+@[\w.-]+>",
    r"</?[a-z][\w.:-]*(?:\s+[\w.:-]+(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[\w.:-]+))?)*\s*/?>|<!--.*?-->",
    r"&(?:amp|lt|gt|quot|apos|nbsp|mdash);",
    rf"https?://[^\s<>\"|()]+\.{_ADDRESS}",
    rf"www\.{_HYPHENATED}(?:\.{_HYPHENATED})+(?:/{_ADDRESS})?",
    rf"[\w.+-]*\w@{_ALNUM}+(?:[.-]{_ALNUM}+)*",
    rf"@[a-z_]\w*|\#{_LETTER}+",
    r">?[:;=](?:[-o*']?[()@{}|[\]\\]|[dp3](?!\w))(?!\w)",  # smileys
    # Apostrophes: clitics, and words that contain one.
    rf"{_ALNUM}+?(?=n{_APOSTROPHE}t{_END})",
    rf"n{_APOSTROPHE}t{_END}|{_APOSTROPHE}(?:{_CLITIC}){_END}",
    rf"'(?:tis|twas|em|cause|till?){_END}|'n(?:'|{_END})|'\d\d(?:s|{_END})",
    rf"(?:c'mon|cap'n|s'mores){_END}|(?:ol|somethin)'{_END}|y{_APOSTROPHE}",
    rf"(?-i:[A-HJ-XZdlno]){_APOSTROPHE}{_LETTER}{{2,}}",  # o'clock, O'Hare, d'oh
    rf"{_LETTER}+(?<=[aeiouy]){_APOSTROPHE}(?!(?:{_CLITIC}){_END})(?-i:[aeiouA-Z]){_LETTER}*",  # ma'am, Hawai'i
    # Capitals: AT&T, US$5.
    r"(?-i:[A-Z]+(?:(?:&amp;|&)[A-Z]+)+)|(?-i:[A-Z]*)\$",
    # Periods.
    rf"(?:{_any(_ABBREVIATIONS)}|(?-i:{_any(_CAPITALISED)}))\.{_END}|(?<=et )al\.|(?:{_any(_NUMBERED)})\.(?=\s*\d)",
    rf"[a-z](?=\.\s*(?:$|\s(?-i:{_any(_STARTS)})\s))",
    rf"(?:[a-z]\.)+(?!{_LETTER})(?:-{_HYPHENATED})?",  # a.m., U.S.-based
    rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+(?:-{_HYPHENATED})?",  # dog.cat
    # Numbers and words.
    rf"\d+ \d+/\d+|{_SHORT}(?:/{_SHORT}){{1,2}}",  # 1 1/2, 9/11, and/or
    rf"[-+]?\d*(?:[.,]\d+)+(?:-{_HYPHENATED}|(?![:\d]))|\d*(?:[.,:]\d+)+",  # -1,000.5, 4.5-inch, 10:30
    rf"c\+\+|{_HYPHENATED}|[-+]\d+",
    # Marks; characters that Stanford's tokenizer deletes match no rule.
    r"[?!]+|<<|>>|-+|\.+|\*+|_+|\#+|``|''",
    r"[^\s\u200b\u2012\ufe0f\ufeff\U00010000-\U0010ffff]",
)
_TOKEN = re.compile(rf"\s*+({'|'.join(_RULES)})", re.IGNORECASE)
# Includes curly and angled quotes, dashes, an ellipsis and a soft hyphen.
_DROPPED = re.compile(
    r"\.+|-{1,4}|''|``|&(?:quot|apos|nbsp|mdash);"
    r"|[,:;?!'\"`\u201c\u201d\u2018\u2019\u00ab\u00bb\u2039\u203a\u2013\u2014\u2026\u00ad]"
)

# Tokens that Stanford's tokenizer rewrites; "gonna" and the like become two words.
_REWRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "€": "$", "¤": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">",
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "'tis": "'t is", "'twas": "'t was", **{f"\u2019{clitic}": f"'{clitic}" for clitic in _CLITIC.split("|")},
    "n\u2019t": "n't",
}  # fmt: skip
_BRACKETS = str.maketrans({mark: _REWRITTEN[mark] for mark in "()[]{}"})


def tokenize(text: str) -> str:
    """Return the tokens of a caption, separated by single spaces.

    Args:
        text: a raw caption; line breaks count as white space.
    """
    return " ".join(filter(None, map(_normalized, _TOKEN.findall(text.strip()))))


@lru_cache(maxsize=1 << 16)
def _normalized(token: str) -> str:
    """Return the normal form of a token; empty for a dropped mark."""
    if _DROPPED.fullmatch(token):
        return ""
    token = token.lower().replace("&amp;", "&").replace(" ", "\u00a0")
    return _REWRITTEN.get(token) or (token.translate(_BRACKETS) if token[0] in ">:;=" else token)
