"""Maps characters that look like Latin letters to those letters.

Unicode's compatibility forms (full width, mathematical, circled, superscript letters) are not here: normalisation
(NFKD) already turns them into letters. After "confusables" of Unicode Technical Standard 39, reduced to letters that
occur in words.
"""

from __future__ import annotations

_SAME = {
    "a": "аɑαᴀạ∂ꭺᎪ@4", "b": "ЬьвʙβƄᏴ฿ɓ", "c": "сϲᴄⅽⲥ¢ꮯᏟ©", "d": "ԁɗᴅⅾꭰᎠժđ", "e": "еєҽɛᴇεꭼᎬ3€ə℮",
    "f": "ғꜰƒϝք", "g": "ɡɢցԍᏀǥ", "h": "һʜհнᏂꮋ", "i": "іɪιıӏӀᎥ1!|ⅰỉɩ", "j": "јϳᴊյ", "k": "кᴋκҡƙᏦ",
    "l": "ⅼʟӏᏞℓłɫ", "m": "мᴍⅿꮇᎷʍ", "n": "ոɴпηνռƞ", "o": "оοσᴏօ0өøⲟ๐ⲟ", "p": "рρᴘꮲᏢþƿ", "q": "ԛգզ", "r": "гʀꮁᏒɾ",
    "s": "ѕꜱʂᏚ5$§", "t": "тᴛτꭲᎢ7†ŧ", "u": "υᴜսʋц", "v": "ѵᴠⅴν", "w": "ԝᴡѡաω", "x": "хⅹχҳ×", "y": "уүʏγყ¥",
    "z": "ᴢʐᏃƶ",
}  # fmt: skip
_LATER = {"ν": "v", "ӏ": "l", "1": "i", "н": "h", "в": "b"}  # the letter to take if several above list a character

# Capitals that look like a different letter than their lower-case form.
CAPITALS = {ord(mark): letter for mark, letter in zip("ΗΝΡΧΥΒΖΜΚΙΤΑΕΟ", "hnpxybzmkitaeo", strict=True)}
# Letters in squares, circles and flags that no compatibility form turns into letters.
PICTURED = {
    start + place: letter
    for start in (0x1F150, 0x1F170, 0x1F1E6)
    for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
}
_LISU = dict(zip("ꓮꓐꓚꓓꓰꓝꓖꓧꓲꓙꓗꓡꓟꓠꓳꓑꓣꓢꓔꓴꓦꓪꓫꓬꓜ", "abcdefghijklmnoprstuvwxyz", strict=True))
LETTERS = (
    {ord(mark): letter for letter, marks in _SAME.items() for mark in marks}
    | {ord(mark): letter for mark, letter in (_LATER | _LISU).items()}
    | PICTURED
)
