"""What the processes of one training do together: engines, and the torch.distributed form of them."""

from tunerkit.parallel import group
from tunerkit.parallel.agreement import refuse_differing, take_from_first_
from tunerkit.parallel.choice import engine_for
from tunerkit.parallel.dtensors import gathered, is_split, local_part, reshard_
from tunerkit.parallel.engine import Alone, Engine, Held, Removable, same
from tunerkit.parallel.flat import flat, unflatten_
from tunerkit.parallel.group import gather_text, in_group, is_grouped, is_launched, processes, rank, reduce_
from tunerkit.parallel.meeting import Meeting
from tunerkit.parallel.optimizer_state import own_state, whole_state
from tunerkit.parallel.pieces import Pieces, whole_pieces
from tunerkit.parallel.replicated import Apart, Replicated
from tunerkit.parallel.sharded import Sharded
from tunerkit.parallel.writing import written_once
