package node

import (
	"path/filepath"
	"slices"
	"sync"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
)

const fileRCPs = "rcps.json"

// trialTime is how long a new RCP list may take to prove that one of its
// addresses can be reached.
const trialTime = 5 * time.Minute

// maxAddresses bounds what a node dials in parallel.
const maxAddresses = 32

// addresses decides what an instance dials: the addresses of its join code,
// and the RCP list that the gateway sent last and that has worked (PD-17). A
// new list is tried beside the old one; it takes the old one's place when a
// channel came about through it, and is dropped when none does.
type addresses struct {
	file string

	mu    sync.Mutex
	lists rcpLists
	since time.Time // begin of the trial
}

type rcpLists struct {
	Good     []string `json:"good,omitempty"`
	Trial    []string `json:"trial,omitempty"`
	Rejected []string `json:"rejected,omitempty"` // the trial that failed last
}

func openAddresses(dir string) (*addresses, error) {
	a := &addresses{file: filepath.Join(dir, fileRCPs), since: time.Now()}
	return a, loadJSON(a.file, &a.lists)
}

// offer takes a list from a desired state. live are the addresses that are
// connected. It reports whether what to dial has changed.
func (a *addresses) offer(rcps []wire.RCPAddresses, live []string) (changed bool, err error) {
	var list []string
	for _, r := range rcps {
		list = append(list, r.Addresses...)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	list = list[:min(len(list), maxAddresses)]
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(list) == 0 || slices.Equal(list, a.lists.Trial) || slices.Equal(list, a.lists.Rejected) {
		return false, nil // an empty list says nothing; cutting ourselves off is not asked for
	}
	next := a.lists
	next.Trial, next.Rejected = list, nil
	if slices.Equal(list, a.lists.Good) {
		next.Trial = nil
	}
	if slices.Equal(next.Trial, a.lists.Trial) && a.lists.Rejected == nil {
		return false, nil
	}
	a.since = time.Now()
	if slices.ContainsFunc(live, func(addr string) bool { return slices.Contains(next.Trial, addr) }) {
		next.Good, next.Trial = next.Trial, nil
	}
	return true, a.save(next)
}

// reached is told when a channel to addr came about.
func (a *addresses) reached(addr string) (changed bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Contains(a.lists.Trial, addr) {
		return false, nil
	}
	return true, a.save(rcpLists{Good: a.lists.Trial})
}

// expire drops a trial whose time is over. next is when to ask again; 0: no
// trial is under way.
func (a *addresses) expire() (dropped []string, next time.Duration, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.lists.Trial) == 0 {
		return nil, 0, nil
	}
	if left := trialTime - time.Since(a.since); left > 0 {
		return nil, left, nil
	}
	dropped = a.lists.Trial
	return dropped, 0, a.save(rcpLists{Good: a.lists.Good, Rejected: dropped})
}

// unlisted tells whether the gateway has sent a list that has worked, and does not
// name an address: that of a join code whose RCP was removed since. It is dialled all
// the same, for the day on which none of the list answers.
func (a *addresses) unlisted(addr string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.lists.Good) > 0 && !slices.Contains(a.lists.Good, addr) && !slices.Contains(a.lists.Trial, addr)
}

// all is what to dial, beside the join addresses.
func (a *addresses) all(join []string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := slices.Concat(join, a.lists.Good, a.lists.Trial)
	slices.Sort(out)
	out = slices.Compact(out)
	return out[:min(len(out), 3*maxAddresses)]
}

// save is called with mu held; a list that is not on disk still holds.
func (a *addresses) save(next rcpLists) error {
	a.lists = next
	return atomicfile.WriteJSON(a.file, next)
}
