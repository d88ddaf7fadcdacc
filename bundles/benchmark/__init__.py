"""How fast this machine imports, beside what its disks and processor could do at most.

cloister bench import --from /media/stick --to /var/lib/cloister --size 2GiB
"""

from bundles.benchmark.rounds import Options as Options
from bundles.benchmark.rounds import Outcome as Outcome
from bundles.benchmark.rounds import measure as measure
