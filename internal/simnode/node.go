package simnode

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	fileState = "state.json"
	fileSpool = "spool"
)

// node is one simulated node.
type node struct {
	w      *Worker
	number int
	name   string
	id     *identity.Identity
	spool  *spool

	generation atomic.Int64
	outboxes   atomic.Int32
	slowUntil  atomic.Int64 // unix nanoseconds: until then answers come late
	applicant  atomic.Pointer[enroll.Applicant]

	mu     sync.Mutex
	state  nodeState
	held   wire.Nonce // the last one that a gateway brought
	digest string     // of the hello; empty: to be made again
	kicks  int64
	change chan struct{}
	conn   *channel.Conn // the newest certified one
	lost   bool          // it ended, and no other came yet
}

// nodeState is what a node keeps besides its identity.
type nodeState struct {
	Installation string              `json:"installation,omitempty"`
	Revision     wire.Revision       `json:"revision"`
	Policies     []wire.PolicyStatus `json:"policies,omitempty"`
}

// openNode loads a node, or makes its key.
func openNode(w *Worker, number int) (*node, error) {
	n := &node{w: w, number: number, name: fmt.Sprintf("%s-%05d", w.cfg.Name, number)}
	shelf := w.vault.of(number)
	var err error
	if n.id, err = identity.OpenStore(shelf, wire.RoleNode); err != nil {
		return nil, err
	}
	if b := w.vault.read(number, fileState); b != nil {
		if err := json.Unmarshal(b, &n.state); err != nil {
			return nil, fmt.Errorf("%s of %s: %w", fileState, n.name, err)
		}
	}
	n.spool = w.events[number-w.cfg.First]
	return n, nil
}

func (n *node) save(s nodeState) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := n.w.vault.write(fileRecord{n.number, fileState, b}); err != nil {
		return err
	}
	n.mu.Lock()
	n.state = s
	n.mu.Unlock()
	n.touched()
	return nil
}

// run enrols the node if it has to, and keeps it connected until ctx ends.
func (n *node) run(ctx context.Context) error {
	_, certified := n.id.Party()
	if certified && !n.id.OutOfTime() {
		return n.connect(ctx)
	}
	select {
	case n.w.enrolling <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	leave := sync.OnceFunc(func() { <-n.w.enrolling })
	defer leave()
	a := enroll.New(enroll.Config{
		Identity: n.id, Join: n.w.join, Name: n.name, Tags: n.w.cfg.Tags, Program: n.w.cfg.Version, Log: n.w.quiet,
		OnGrant: func(v wire.EnrollVerdict) error {
			return n.save(nodeState{Installation: v.Installation})
		},
	})
	n.applicant.Store(a)
	enrolling, done := context.WithCancel(ctx)
	defer done()
	var wg sync.WaitGroup
	defer wg.Wait()
	granted := a.Granted()
	wg.Go(func() {
		if err := a.Run(enrolling); err != nil {
			n.w.fail(fmt.Errorf("%s: %w", n.name, err))
		}
	})
	wg.Go(func() {
		select {
		case <-granted:
			n.w.count.enrolled.Add(1)
		case <-ctx.Done():
		}
		done()
		leave()
	})
	for a.Status().State == enroll.StateNoCode { // until it has pinned the root of its code
		changed := a.Changed()
		if a.Status().State != enroll.StateNoCode {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
	return n.connect(ctx)
}

// connect keeps the node connected to its one upstream.
func (n *node) connect(ctx context.Context) error {
	up := n.w.cfg.Upstreams[n.number%len(n.w.cfg.Upstreams)]
	d := &channel.Dialer{Addr: up, Peer: channel.PeerUpstream, Identity: n.id, Carrier: n.w.cfg.Carrier, Log: n.w.quiet, OnState: n.note,
		DialContext: n.w.dialFrom(n.number)}
	err := d.Run(ctx, n.serve)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%s: %w", n.name, err)
}

// note counts failed attempts.
func (n *node) note(s channel.State) {
	if s.Connected() || s.Err == nil {
		return
	}
	n.mu.Lock()
	was := n.lost
	n.lost = true
	n.mu.Unlock()
	var op *net.OpError
	if s.Failures > 0 && (was || errors.As(s.Err, &op)) {
		n.w.count.failures.Add(1)
		n.w.complain(n.name, s.Err)
	}
}

// serve answers one channel until it ends.
func (n *node) serve(ctx context.Context, c *channel.Conn) {
	n.w.count.dialled.Add(1)
	if !c.Enrolling() {
		n.mu.Lock()
		n.conn, n.lost = c, false
		n.mu.Unlock()
	}
	_ = c.Serve(ctx, &channelHandler{n: n, c: c, generation: n.generation.Add(1)}) // the dialler comes again, whatever it was
	n.mu.Lock()
	if n.conn == c {
		n.conn = nil
	}
	n.mu.Unlock()
}

// touched is told when the hello may say something new.
func (n *node) touched() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.digest = ""
	n.wakeLocked()
}

// kick makes the signals repeat themselves: there is something in the outbox.
func (n *node) kick() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.kicks++
	n.wakeLocked()
}

func (n *node) wakeLocked() {
	if n.change != nil {
		close(n.change)
		n.change = nil
	}
}

// signal is the present hint, and what is closed by the next one.
func (n *node) signal(generation int64) (s wire.Signal, kicks int64, changed <-chan struct{}) {
	n.mu.Lock()
	if n.change == nil {
		n.change = make(chan struct{})
	}
	kicks, changed = n.kicks, n.change
	digest := n.digest
	n.mu.Unlock()
	if digest == "" {
		digest = n.hello().Digest()
		n.mu.Lock()
		if n.change == changed || n.kicks != kicks {
			n.digest = digest
		}
		n.mu.Unlock()
	}
	s = wire.Signal{ID: n.id.ID(), Boot: n.w.boot, Generation: generation, Digest: digest}
	if n.spool.state().Depth > 0 {
		s.Hints = []string{wire.HintOutbox}
	}
	return s, kicks, changed
}

// hello is what the node says of itself.
func (n *node) hello() wire.Hello {
	party, _ := n.id.Party()
	number, _ := n.id.Revocations()
	trust, _ := n.id.Trust()
	n.mu.Lock()
	st := n.state
	n.mu.Unlock()
	return wire.Hello{
		Party: party, Boot: n.w.boot, Program: n.w.cfg.Version, Versions: wire.OwnVersions, Name: n.name, Tags: n.w.cfg.Tags, Mode: "managed",
		State: wire.StateRunning, Installation: st.Installation, Applied: st.Revision, Policies: st.Policies, Outbox: n.spool.state(),
		Revocations: number, Trust: trust, NotAfter: n.id.NotAfter(), RenewAfter: n.id.RenewAfter(),
		OS: runtime.GOOS, Arch: runtime.GOARCH, Time: time.Now().UTC(), Salt: n.w.salt,
	}
}

// apply takes a signed desired state: verified and on disk before the answer.
// Nothing is done to the host, so every policy is applied at once.
func (n *node) apply(env wire.Envelope) (wire.DesiredResult, error) {
	var doc wire.Desired
	n.mu.Lock()
	st := n.state
	n.mu.Unlock()
	res := wire.DesiredResult{Applied: st.Revision, State: wire.StateRunning, Policies: st.Policies}
	refuse := func(code, reason string) (wire.DesiredResult, error) {
		res.Refused, res.Reason = code, reason
		return res, nil
	}
	if _, err := n.id.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, &doc); err != nil {
		return refuse("bad-signature", err.Error())
	}
	switch {
	case doc.Node != n.id.ID():
		return refuse("wrong-node", "the desired state is for another node")
	case doc.Installation != st.Installation:
		return refuse("locked", "it obeys another installation")
	case doc.Revision.Compare(st.Revision) < 0:
		return refuse("older", fmt.Sprintf("revision %v was accepted", st.Revision))
	}
	now := time.Now().UTC()
	statuses := make([]wire.PolicyStatus, 0, len(doc.Policies))
	sum := sha256.New()
	for _, p := range doc.Policies {
		if spec, ok := doc.Specs[p.Digest]; !ok || wire.SpecDigest(spec) != p.Digest {
			return refuse("bad-signature", "policy "+p.Name+": its spec is missing or does not match its digest")
		}
		_, _ = sum.Write([]byte(p.Digest))
		statuses = append(statuses, wire.PolicyStatus{Name: p.Name, Type: p.Type, Digest: p.Digest, State: wire.PolicyApplied, Since: now})
	}
	if doc.Revision != st.Revision {
		if err := n.save(nodeState{Installation: st.Installation, Revision: doc.Revision, Policies: statuses}); err != nil {
			return res, err
		}
		n.w.arrived(Arrival{Policies: digests(doc.Policies), At: time.Now().UnixNano()})
	}
	res.Applied, res.Policies = doc.Revision, statuses
	return res, nil
}

func digests(policies []wire.Policy) []string {
	out := make([]string, len(policies))
	for i, p := range policies {
		out[i] = p.Digest
	}
	return out
}
