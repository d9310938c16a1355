"""What the name of a folder says about its images: good, with defects, masks, or nothing.

Data sets name their folders ``good`` and ``crack``, ``OK`` and ``NG``, ``Gut`` and ``Schlecht``, ``良品`` and
``不良品``. Names are compared without case, accents, digits and separators, word by word.
"""

import difflib
import re
import unicodedata
from functools import lru_cache
from typing import Literal

FolderKind = Literal["good", "bad", "mask", "train", "test", "neutral", "unclear", "other"]


def _normalise(text: str) -> str:
    """Lower the case and remove accents."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def _words(text: str) -> frozenset[str]:
    return frozenset(_normalise(text).split())


GOOD_WORDS = _words("""
    good ok okay oks normal normals nominal pass passed passing accept accepted acceptable conform conforming
    conformant compliant flawless healthy intact undamaged perfect correct golden clean regular inlier inliers
    typical defectfree faultfree errorfree anomalyfree defectless faultless nondefective nonanomalous nodefect
    nodefects nofault noanomaly gut gute guter gutes gutteil gutteile io ordnung fehlerfrei fehlerlos einwandfrei
    mangelfrei intakt bestanden bon bons bonne bonnes conforme conformes normale normaux normales valide valides
    sain sains bueno buenos buena buenas bien correcto correctos correcta correctas aprobado aprobados aceptado
    aceptados apto aptos buono buoni buona buone conformi normali regolare regolari corretto corretti accettato
    accettati bom boa boas normais aprovado aprovados aceito aceitos perfeito perfeitos goed goede goedgekeurd
    normaal dobre dobry dobra poprawne poprawny prawidlowe prawidlowy normalne bra godkand godkanda godkendt
    godkendte godkjent normalt spravne spravny poradku iyi saglam kusursuz hatasiz hyva hyvat ehja megfelelo
    hibatlan baik bagus годные годный годен хорошие хороший хорошо норма нормальные нормальный исправные исправный
    καλο καλα добре добрий придатний придатні dobar dobri добар geras korras gecti adecuado adecuados
    """)
BAD_WORDS = _words("""
    poke poked squeezed squeeze frayed fray blowhole blowholes crease creases creased abrasion abraded pitted pitting
    dirt dirty smudge smudged burnt burned misaligned misalignment delamination delaminated peeled peeling uneven
    manipulated spatter undercut crazing overheated swapped rotten lesion lesions tumor tumour melanoma pneumonia
    bad bads ng nok nio ko defect defects defective defected fail fails failed failing failure failures fault faults
    faulty anomaly anomalies anomalous anomal abnormal abnormals abnormality abnormalities reject rejects rejected
    scrap broken damage damages damaged flaw flaws flawed wrong error errors incorrect invalid nonconforming
    nonconformity nonconform noncompliant unacceptable unhealthy imperfect outlier outliers notgood notok nogood
    nongood notnormal nonnormal unnormal poor waste irregular crack cracks cracked scratch scratches scratched dent
    dents dented hole holes stain stains stained contamination contaminations contaminated rust rusty corrosion
    corroded burr burrs bent missing misplaced tear torn leak bubbles blister blisters porosity inclusion inclusions
    spalling deformed deformation discoloration discolored chipped wrinkle wrinkles schlecht schlechte schlechter
    schlechtes schlechtteil schlechtteile fehler fehlerhaft fehlerhafte fehlerteile defekt defekte defektes
    ausschuss mangelhaft mangel kaputt beschadigt beschadigte anomalie anomalien anormal riss risse kratzer mauvais
    mauvaise mauvaises defaut defauts defectueux defectueuse defectueuses rebut rebuts nonconforme nonconformes
    rejet rejets casse casses fissure fissures rayure rayures anormale anormaux malo mala malos malas mal defecto
    defectos defectuoso defectuosos defectuosa defectuosas rechazo rechazos rechazado rechazados fallo fallos falla
    fallas anomalia anomalias anormales roto rotos rota rotas grieta grietas cattivo cattivi cattiva cattive difetto
    difetti difettoso difettosi difettosa difettose scarto scarti guasto guasti rotto rotti anomalo anomali anomale
    graffio graffi ruim ruins mau maus defeito defeitos defeituoso defeituosos reprovado reprovados rejeitado
    rejeitados falha falhas slecht slechte fout fouten foutief defecten afgekeurd kapot zle zly wada wady wadliwe
    wadliwy uszkodzone odrzut odrzuty bledne dalig daliga fel defekta felaktig felaktiga kasserad kasserade
    underkand darlig darlige fejl feil vadne vadny spatne spatny vada vady zmetek zmetky kotu hatali hata kusurlu
    bozuk defolu huono huonot vika viat viallinen vialliset hibas rossz selejt rusak cacat buruk брак бракованные
    бракованный дефект дефекты дефектные дефектный плохие плохой плохо аномалия аномалии аномальные негодные
    негодный неисправные неисправный ελαττωμα ελαττωματικα ελαττωματικο κακο κακα погано поганий непридатний непридатні
    несправний лош лоше blogas blogi defektne praak kaldi incorrecto incorrectos incorrecta inadecuado inadecuados
    incorreto incorretos scorretto scorretti loi
    """)
MASK_WORDS = _words("""
    mask masks groundtruth gt gts label labels annotation annotations annot annots seg segs segmentation
    segmentations segmap segmaps maske masken masque masques mascara mascaras maschera maschere maski maska
    """)
TRAIN_WORDS = _words("train training trn")
TEST_WORDS = _words("test testing tests tst val valid validation eval evaluation")
_NEGATIONS = _words("not no non un without nicht kein keine keinen ohne pas sans sin senza sem niet geen zonder bez nie"
                    " ne ikke inte utan uden ei yok без не free nao nem fara degil exempt exempte")  # fmt: skip
_UNCLEAR_WORDS = _words("""
    positive positives positiv positif negative negatives negativ negatif pos neg true false yes suspect suspicious
    uncertain unsure maybe unknown unlabeled unlabelled mixed borderline ambiguous rework reworked repair repaired
    """)
_NEUTRAL_WORDS = _words("""
    image images img imgs pic pics picture pictures photo photos foto fotos bild bilder imagen imagenes immagine
    immagini imagem imagens data dataset datasets raw sample samples part parts teil teile pieces pieza piezas pezzi
    peca pecas set sets subset folder dir files product products item items all only the of in my more extra new old
    again day days night morning evening week month year jan feb mar apr may jun jul aug sep oct nov dec january
    february march april june july august september october november december monday tuesday wednesday thursday
    friday saturday sunday batch batches lot lots line lines cam cams camera cameras view views side sides left
    right top bottom front back rear upper lower inner outer shift station machine position angle session run series
    group sub rgb grey gray color colour tag tage charge kamera linie schicht seite jour jours lote lotes dia dias
    linea lado png jpg jpeg bmp tif tiff webp
    take takes trial trials job jobs order orders kw scan scans shot shots frame frames video videos clip clips capture
    captures exposure acquisition recording recordings aufnahme aufnahmen auftrag woche
    """)
_CLASS_WORDS = _words("class classes type types grade grades kind category klasse kategorie clase classe cls")
_CJK = r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]"
# Words of languages without spaces, searched in the whole name; the first group that matches decides.
_UNSPACED: tuple[tuple[FolderKind, tuple[str, ...]], ...] = (
    ("good", ("無欠陥", "欠陥なし", "无缺陷", "無缺陷", "无异常", "異常なし", "無異常", "无瑕疵", "결함없음", "無傷",
              "ללא פגם")),
    ("mask", ("マスク", "掩码", "掩膜", "遮罩", "标注", "標註", "마스크")),
    ("bad", ("不良", "不合格", "不正常", "非正常", "非良品", "次品", "残次", "废品", "廃棄", "缺陷", "瑕疵", "異常", 
             "异常", "不好", "欠陥", "キズ", "傷", "破损", "裂纹", "划痕", "坏", "불량", "비정상", "결함", "이상",
             "เสีย", "ชำรุด", "ไม่ดี", "معيب", "تالف", "غير سليم", "פגום", "תקול", "לא תקין", "खराब",
             "दोष", "अच्छा नहीं")),
    ("good", ("良品", "合格", "正常", "良好", "양품", "정상", "好", "正品", "سليم", "תקין", "अच्छा")),
)  # fmt: skip


@lru_cache(maxsize=4096)
def classify_folder(name: str) -> FolderKind:
    """Say what the name of a folder means for its images.

    Args:
        name: Name of the folder, without its parents.

    Returns:
        "good" or "bad" (with defects); "mask"; "train" or "test", the split; "neutral" if the name means neither (a
        date, a number, a camera); "unclear" if it could mean either; "other" if no word is known.
    """
    text = unicodedata.normalize("NFKC", name)
    for kind, parts in _UNSPACED:
        if any(_normalise(part) in _normalise(text) for part in parts):
            return kind
    spaced = re.sub(rf"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?={_CJK})|(?<={_CJK})(?=[A-Za-z])", " ", text)
    tokens = re.findall(r"[^\W\d_]+", _normalise(spaced))
    kind = _classify_words(tokens)
    joined = "".join(tokens)  # n.i.O., iO, ground_truth, no good
    if kind in ("other", "neutral", "unclear") and len(tokens) > 1:
        whole = next((k for k, words in _KINDS if joined in words), None)
        return whole or kind
    return kind


def resembles_good(name: str) -> bool:
    """Return whether an unknown name is one letter away from a word for good, such as ``goood``."""
    joined = "".join(re.findall(r"[^\W\d_]+", _normalise(name)))
    return bool(difflib.get_close_matches(joined, [word for word in GOOD_WORDS if len(word) > 3], 1, 0.85))


_KINDS: tuple[tuple[FolderKind, frozenset[str]], ...] = (
    ("mask", MASK_WORDS), ("bad", BAD_WORDS), ("good", GOOD_WORDS),
)  # fmt: skip


def _classify_words(tokens: list[str]) -> FolderKind:
    words = set(tokens)
    if words & MASK_WORDS:
        return "mask"
    good, bad = words & GOOD_WORDS, words & BAD_WORDS
    if good or bad:
        rest = words - good - bad - _NEGATIONS - _NEUTRAL_WORDS - _CLASS_WORDS - TRAIN_WORDS - TEST_WORDS
        rest = {word for word in rest if len(word) > 1}
        if (good and bad) or words & _UNCLEAR_WORDS or (good and rest):
            return "unclear"
        return "bad" if bool(bad) != bool(words & _NEGATIONS) else "good"
    if words & _UNCLEAR_WORDS:
        return "unclear"
    split: tuple[tuple[FolderKind, frozenset[str]], ...] = (("test", TEST_WORDS), ("train", TRAIN_WORDS))
    for kind, names in split:
        if words & names and words <= names | _NEUTRAL_WORDS:
            return kind
    known = words & _NEUTRAL_WORDS
    if not words or (known and all(word in known or len(word) == 1 for word in words)):
        return "neutral"
    return "other"
