package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
	"sallyport/node/policy"
)

const fileDesired = "desired.json"

// Reasons for refusing a desired state, as wire.DesiredResult carries them.
const (
	refusedLocked    = "locked"
	refusedReadonly  = "readonly"
	refusedOlder     = "older"
	refusedWrongNode = "wrong-node"
	refusedSignature = "bad-signature"
	refusedDraining  = "draining"
)

// accepted is a desired state that was verified. The verdict is kept with it:
// the signer's certificate ends, what it signed holds on.
type accepted struct {
	Envelope wire.Envelope `json:"envelope"`
	Verdict  verdict       `json:"verdict"`
}

type verdict struct {
	Signer   wire.Party    `json:"signer"`
	Revision wire.Revision `json:"revision"`
	At       time.Time     `json:"at"`
}

// desired keeps the desired state of one instance: verified, on disk before it
// is applied, applied again after a restart without any gateway.
type desired struct {
	file     string
	id       *identity.Identity
	lock     *interlock
	engine   *policy.Engine
	readonly bool
	log      *slog.Logger
	onRCPs   func([]wire.RCPAddresses)
	life     context.Context // of the instance: what outlives a session ends with it

	putting sync.Mutex // one document at a time, from acceptance to report

	mu      sync.Mutex
	doc     *wire.Desired // accepted; nil before the first
	applied wire.Revision // what the last Apply was for
	by      string        // installation that counts so
}

// refusal is why a document is not obeyed.
type refusal struct {
	code string
	err  error
}

func (r *refusal) Error() string { return r.err.Error() }

// load reads the last accepted state.
func (d *desired) load() error {
	var a accepted
	if err := loadJSON(d.file, &a); err != nil {
		return err
	}
	if a.Envelope.Payload == nil {
		return nil
	}
	doc := &wire.Desired{}
	if err := json.Unmarshal(a.Envelope.Payload, doc); err != nil {
		return fmt.Errorf("%s is damaged: %w (move it away to go on without)", d.file, err)
	}
	d.doc = doc
	return nil
}

// restore applies what was accepted in an earlier life.
func (d *desired) restore(ctx context.Context) {
	d.putting.Lock()
	defer d.putting.Unlock()
	d.mu.Lock()
	doc := d.doc
	d.mu.Unlock()
	switch {
	case doc == nil:
	case d.readonly: // as it was when the host became read-only
		d.mu.Lock()
		d.applied, d.by = doc.Revision, doc.Installation
		d.mu.Unlock()
	default:
		_, _ = d.apply(ctx, doc) // the error says that we are stopping
	}
}

// apply returns an error only when ctx ended: what is accepted is applied at
// the next start then.
func (d *desired) apply(ctx context.Context, doc *wire.Desired) ([]wire.PolicyStatus, error) {
	statuses := d.engine.Apply(ctx, doc.Policies, doc.Specs)
	if ctx.Err() != nil {
		return statuses, fmt.Errorf("desired state %v is accepted and not applied: %w", doc.Revision, errStopped)
	}
	d.mu.Lock()
	d.applied, d.by = doc.Revision, doc.Installation
	d.mu.Unlock()
	return statuses, nil
}

// revision is what the hello calls applied. Each installation counts for itself:
// once the node obeys another one, or the next that comes, what it has of the one
// before is no number of that, and must not look like one that is ahead of it.
func (d *desired) revision() wire.Revision {
	uid, err := d.lock.installation()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && uid != d.by {
		return wire.Revision{}
	}
	return d.applied
}

// put takes a signed desired state. A refusal leaves everything as it is.
func (d *desired) put(ctx context.Context, env wire.Envelope) (wire.DesiredResult, error) {
	d.putting.Lock()
	defer d.putting.Unlock()
	doc, signer, err := d.verify(env)
	if no, ok := errors.AsType[*refusal](err); ok {
		d.log.Warn("desired state refused", "why", no.code, "reason", no.Error())
		return wire.DesiredResult{Applied: d.revision(), Refused: no.code, Reason: no.Error(), Policies: d.engine.Statuses()}, nil
	}
	if err != nil {
		return wire.DesiredResult{}, err
	}
	a := accepted{Envelope: env, Verdict: verdict{Signer: signer, Revision: doc.Revision, At: time.Now().UTC()}}
	err = atomicfile.WriteJSON(d.file, a)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		d.log.Error("desired state not taken", "error", err)
		reason := fmt.Sprintf("%v: free some space on the node; it is tried again", err)
		return wire.DesiredResult{Applied: d.revision(), Refused: wire.RefusedFull, Reason: reason, Policies: d.engine.Statuses()}, nil
	}
	if err != nil {
		return wire.DesiredResult{}, fmt.Errorf("desired state %v is not on disk: %w", doc.Revision, err)
	}
	d.mu.Lock()
	d.doc = doc
	d.mu.Unlock()
	if err := d.lock.setName(doc.Name); err != nil {
		d.log.Warn("keep the node's name", "error", err)
	}
	d.onRCPs(doc.RCPs)
	// The gateway may go away meanwhile: what is accepted is applied. The agent
	// may be stopped meanwhile: that is not delayed.
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(d.life, stop)()
	statuses, err := d.apply(ctx, doc)
	if err != nil {
		return wire.DesiredResult{}, err
	}
	d.log.Info("desired state applied", "revision", doc.Revision, "policies", len(doc.Policies))
	return wire.DesiredResult{Applied: doc.Revision, Policies: statuses}, nil
}

// verify decides whether a document is for this node, now, from the gateway
// that it obeys. The installation is looked at before the revision, so that a
// gateway with a new database locks the node instead of looking old.
func (d *desired) verify(env wire.Envelope) (*wire.Desired, wire.Party, error) {
	doc := &wire.Desired{}
	peer, err := d.id.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, doc)
	if err != nil {
		return nil, wire.Party{}, &refusal{refusedSignature, err}
	}
	if doc.Node != d.id.ID() {
		return nil, wire.Party{}, &refusal{refusedWrongNode, fmt.Errorf("the desired state is for node %s", wire.Quotable(string(doc.Node)))}
	}
	if d.readonly {
		return nil, wire.Party{}, &refusal{refusedReadonly, errors.New("SALLYPORT_NODE_MODE is readonly: the node reports, and obeys nothing that changes it")}
	}
	var locked *lockedError
	if err := d.lock.obey(doc.Installation); errors.As(err, &locked) {
		return nil, wire.Party{}, &refusal{refusedLocked, err}
	} else if err != nil {
		return nil, wire.Party{}, err
	}
	if why := d.lock.draining(); why != "" {
		return nil, wire.Party{}, &refusal{refusedDraining, fmt.Errorf("the node is being drained: %s", why)}
	}
	if err := d.fresh(doc); err != nil {
		return nil, wire.Party{}, &refusal{refusedOlder, err}
	}
	if err := complete(doc); err != nil {
		return nil, wire.Party{}, &refusal{refusedSignature, err}
	}
	return doc, peer.Party, nil
}

// fresh refuses a lower revision of the same installation, and other policies
// under a revision that was accepted.
func (d *desired) fresh(doc *wire.Desired) error {
	d.mu.Lock()
	held := d.doc
	d.mu.Unlock()
	if held == nil || held.Installation != doc.Installation {
		return nil
	}
	switch c := doc.Revision.Compare(held.Revision); {
	case c < 0:
		return fmt.Errorf("revision %v is lower than %v, which the node has accepted", doc.Revision, held.Revision)
	case c == 0 && !slices.Equal(doc.Policies, held.Policies):
		return fmt.Errorf("revision %v was accepted with other policies", doc.Revision)
	}
	return nil
}

// complete checks that each policy's spec is there and is what its digest says.
func complete(doc *wire.Desired) error {
	if len(doc.Policies) > policy.MaxPolicies {
		return fmt.Errorf("%d policies are above the limit of %d", len(doc.Policies), policy.MaxPolicies)
	}
	names := map[string]bool{}
	for _, p := range doc.Policies {
		if p.Name == "" || len(p.Name) > 253 || strings.ContainsAny(p.Name, "/\x00\n") || names[p.Name] {
			return fmt.Errorf("policy name %q is empty, malformed or there twice", wire.Quotable(p.Name))
		}
		names[p.Name] = true
		if spec, ok := doc.Specs[p.Digest]; !ok || wire.SpecDigest(spec) != p.Digest {
			return fmt.Errorf("policy %s: its spec is missing or does not match its digest", p.Name)
		}
	}
	return nil
}

func desiredFile(dir string) string { return filepath.Join(dir, fileDesired) }
