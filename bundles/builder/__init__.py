"""Build a bundle from a model's folder, and sign one.

    manifest = build(Release(name="demo", version="1.0.0", sequence=1), Path("model"), Path("demo.bundle"))
    sign(Path("demo.bundle"), Signing(root=root, release_keys=(release,), publisher_key=publisher))

Building judges the folder as importing will. Signing verifies every chunk of all volumes first, so no key ever
signs for bytes that are not there.
"""

from bundles.builder.building import build as build
from bundles.builder.building import check as check
from bundles.builder.preparing import Preparation as Preparation
from bundles.builder.preparing import Quantisation as Quantisation
from bundles.builder.preparing import prepared as prepared
from bundles.builder.release import Output as Output
from bundles.builder.release import Release as Release
from bundles.builder.signing import Signing as Signing
from bundles.builder.signing import check_signing as check_signing
from bundles.builder.signing import sign as sign
from bundles.builder.volumes import written as written
