from two_tasks import answerer as answerer
from two_tasks import patient as patient
from two_tasks import run as run
