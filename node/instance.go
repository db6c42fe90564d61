package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/internal/attest"
	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/parking"
	"sallyport/internal/wire"
	"sallyport/node/policy"
	"sallyport/node/proc"
	"sallyport/node/spool"
)

// overflowEvery spaces the events that tell of a spool above its quota.
const overflowEvery = time.Hour

// instance is one gateway's isolated world on this node (MI-01): identity,
// trust, lock, policies, actions, spool and channels.
type instance struct {
	cfg      Config
	td       string
	dir      string
	log      *slog.Logger
	boot     string
	salt     string
	readonly bool

	id         *identity.Identity
	applicant  *enroll.Applicant
	lock       *interlock
	engine     *policy.Engine
	desired    *desired
	actions    *actions
	spool      *spool.Spool
	addresses  *addresses
	upstreams  *upstreams
	lanes      *lanes
	signals    signals
	targets    *targets
	challenges *challenges
	lot        *parking.Lot // of all instances; nil: no local clients
	sessionAPI http.Handler
	generation atomic.Int64
	outboxes   atomic.Int32
	overflow   atomic.Int64 // unix seconds of the last event about it
	dropped    chan int64
	clock      local.Clock
	copies     copies
	quarantine atomic.Bool          // as a gateway said last
	rebirth    sync.Mutex           // one change of identity at a time
	reborn     chan []*channel.Conn // of the identity before: they are to end
	join       *identity.JoinSource
}

// openInstance reads an instance's directory, or makes it, and repairs what a
// crash left. Nothing runs before Run.
func openInstance(cfg Config, td string, join *identity.JoinSource, claims *policy.Claims, lot *parking.Lot, boot string, log *slog.Logger) (_ *instance, err error) {
	in := &instance{
		cfg: cfg, td: td, dir: filepath.Join(cfg.Dir(string(wire.RoleNode)), td), boot: boot, salt: string(wire.NewID()),
		log: log.With("instance", td), readonly: cfg.Mode == config.Readonly, lot: lot, dropped: make(chan int64, 1),
		reborn: make(chan []*channel.Conn, 1), join: join, copies: copies{held: wire.NewNonce()},
	}
	defer func() {
		if err != nil && in.spool != nil {
			err = errors.Join(err, in.spool.Close())
		}
	}()
	if in.id, err = identity.Open(filepath.Join(in.dir, "identity"), wire.RoleNode); err != nil {
		return nil, err
	}
	identity.WarnExposed(in.log, filepath.Join(in.dir, "identity", "key*.pem"))
	dir, err := spool.OpenDir(filepath.Join(in.dir, "spool"))
	if err != nil {
		return nil, err
	}
	if in.spool, err = spool.Open(spool.Config{Dir: dir, Quota: int64(cfg.SpoolMax), Log: in.log, OnDrop: in.noteDropped}); err != nil {
		return nil, err
	}
	if in.lock, err = openInterlock(in.dir, in.raise); err != nil {
		return nil, err
	}
	reach := &policy.Reach{Allow: cfg.AllowTargets}
	in.engine, err = policy.Open(policy.Config{
		Dir: filepath.Join(in.dir, "policies"), Instance: td, Claims: claims, Log: in.log,
		Bounds:   policy.Bounds{Allow: proc.Allow(cfg.AllowPaths), Forbidden: forbidden(cfg)},
		Commands: proc.Allow(cfg.AllowPolicyCommands), Raise: in.store, Changed: in.changed,
		Reach: reach,
	})
	if err != nil {
		return nil, err
	}
	if in.actions, err = openActions(filepath.Join(in.dir, "actions"), proc.Allow(cfg.AllowCommands), in.log, in.changed); err != nil {
		return nil, err
	}
	if in.addresses, err = openAddresses(in.dir); err != nil {
		return nil, err
	}
	in.desired = &desired{
		file: desiredFile(in.dir), id: in.id, lock: in.lock, engine: in.engine, readonly: in.readonly, log: in.log, onRCPs: in.takeRCPs,
		life: context.Background(),
	}
	if err := in.desired.load(); err != nil {
		return nil, err
	}
	in.applicant = enroll.New(enroll.Config{
		Identity: in.id, Join: join, TrustDomain: td, Name: string(cfg.Name), Tags: cfg.Tags, Program: cfg.Version, OnGrant: in.granted, Attest: device(cfg), Log: in.log,
	})
	in.targets = newTargets(in.engine, reach, newBuiltin(in.about, in.log), in.closedToTargets, in.log)
	in.challenges = newChallenges(cfg.Challenges, in.closedToTargets, in.log)
	in.upstreams = newUpstreams(in)
	in.lanes = newLanes()
	in.sessionAPI = in.newSessionAPI()
	if err := in.applicant.TakeImported(); err != nil {
		return nil, err
	}
	return in, nil
}

// device is the device that vouches for the node; nil: none does. Its files are
// read anew each time: a certificate may be replaced, and the key need not stay
// in memory.
func device(cfg Config) func(wire.AttestationStatement) (*wire.Envelope, error) {
	if cfg.AttestationCert == "" {
		return nil
	}
	return func(s wire.AttestationStatement) (*wire.Envelope, error) {
		d, err := attest.Load(cfg.AttestationCert, cfg.AttestationKey)
		if err != nil {
			return nil, fmt.Errorf("%w (SALLYPORT_NODE_ATTESTATION_CERT, SALLYPORT_NODE_ATTESTATION_KEY)", err)
		}
		return d.Sign(s)
	}
}

// forbidden is SALLYPORT_DATA, by every name that leads to it.
func forbidden(cfg Config) []string {
	out := []string{filepath.Clean(cfg.Data)}
	if real, err := filepath.EvalSymlinks(cfg.Data); err == nil && real != out[0] {
		out = append(out, real)
	}
	return out
}

// Run works for one gateway until ctx ends.
func (in *instance) Run(ctx context.Context) (err error) {
	in.log.Info("instance starts", "id", in.id.ID(), "fingerprint", in.id.Fingerprint(), "applied", in.desired.revision())
	defer func() { err = errors.Join(err, in.spool.Close()) }()
	g, ctx := errgroup.WithContext(ctx)
	in.desired.life = ctx
	g.Go(func() error { return in.applicant.Run(ctx) })
	g.Go(func() error { return in.actions.Run(ctx) })
	g.Go(func() error { return in.upstreams.Run(ctx) })
	g.Go(func() error { return in.lanes.Run(ctx) })
	g.Go(func() error { return in.watch(ctx) })
	g.Go(func() error {
		in.desired.restore(ctx) // without any gateway: what was accepted holds
		in.changed()
		return in.engine.Run(ctx)
	})
	return g.Wait()
}

// watch follows certificate, revocations, enrolment and spool.
func (in *instance) watch(ctx context.Context) error {
	var told int64             // next seq when the signals last spoke of the outbox
	var former []*channel.Conn // of an identity that is no more
	rebirth := time.NewTimer(0)
	rebirth.Stop()
	defer rebirth.Stop()
	for {
		identity, enrolment, spooled := in.id.Changed(), in.applicant.Changed(), in.spool.Changed()
		if number, _ := in.id.Revocations(); number > 0 {
			in.upstreams.cut(errRevoked, in.id.Revoked(in.id.KeyHash()))
		}
		if st, err := in.spool.State(); err == nil && st.Depth > 0 && st.Next != told && in.outboxes.Load() == 0 {
			told = st.Next
			in.signals.kick()
		}
		in.signals.wake()
		select {
		case <-ctx.Done():
			return nil
		case <-identity:
		case <-enrolment:
		case <-spooled:
		case n := <-in.dropped:
			in.tellDropped(n)
		case conns := <-in.reborn:
			former = append(former, conns...)
			rebirth.Reset(rebirthPause)
		case <-rebirth.C:
			for _, c := range former {
				c.Close(errReidentified)
			}
			former = nil
		}
	}
}

var errRevoked = fmt.Errorf("revoked: %w", identity.ErrRevoked)

// changed is told whenever the hello may say something new.
func (in *instance) changed() { in.signals.wake() }

// granted keeps what a grant carries beside the certificate.
func (in *instance) granted(v wire.EnrollVerdict) error {
	if err := in.lock.learn(v.Installation); err != nil {
		return fmt.Errorf("keep the installation: %w", err)
	}
	if err := in.lock.setName(v.Name); err != nil {
		return fmt.Errorf("keep the name: %w", err)
	}
	in.takeRCPs(v.RCPs)
	return nil
}

func (in *instance) takeRCPs(rcps []wire.RCPAddresses) {
	changed, err := in.addresses.offer(rcps, in.upstreams.connected())
	if err != nil {
		in.log.Warn("keep the RCP list", "error", err)
	}
	if changed {
		in.upstreams.poke()
	}
}

// store puts an event on disk.
func (in *instance) store(e wire.Event) error {
	_, err := in.spool.Append(e)
	return err
}

// raise stores an event of the node about itself; when the disk refuses it,
// the log has it.
func (in *instance) raise(e wire.Event) {
	if err := in.store(e); err != nil {
		in.log.Error("event not stored", "text", e.Text, "error", err)
	}
}

// noteDropped is called by the spool, perhaps often; watch tells of it.
func (in *instance) noteDropped(n int64) {
	select {
	case in.dropped <- n:
	default: // the number is in the spool's state too
	}
}

func (in *instance) tellDropped(n int64) {
	now := time.Now().Unix()
	if last := in.overflow.Load(); last != 0 && now-last < int64(overflowEvery/time.Second) {
		return
	}
	in.overflow.Store(now)
	st, err := in.spool.State()
	if err != nil {
		return
	}
	in.raise(wire.Event{Severity: wire.SeverityMajor, Application: "sallyport", Object: "spool", Key: "spool-overflow",
		Text: fmt.Sprintf("the event spool is above its quota: %d events were dropped just now, %d so far, lowest severities first", n, st.Dropped)})
}

// state is one word for how the node fares, and why.
func (in *instance) state() (wire.NodeState, string) {
	if err := in.applicant.Ready(); err != nil {
		if in.id.Revoked(in.id.KeyHash()) {
			return wire.StateRevoked, in.applicant.Status().Reason
		}
		return wire.StatePending, in.applicant.Status().Why()
	}
	if why := in.lock.locked(); why != "" {
		return wire.StateLocked, why
	}
	if in.readonly {
		return wire.StateReadonly, "SALLYPORT_NODE_MODE is readonly"
	}
	if why := in.lock.draining(); why != "" {
		return wire.StateDraining, why
	}
	for _, p := range in.engine.Statuses() {
		if p.State == wire.PolicyFailed {
			return wire.StateFailing, fmt.Sprintf("policy %s: %s", p.Name, p.Error)
		}
	}
	return wire.StateRunning, ""
}

// hello is what this node says of itself.
func (in *instance) hello() wire.Hello {
	party, _ := in.id.Party()
	number, _ := in.id.Revocations()
	trust, _ := in.id.Trust()
	installation, err := in.lock.installation()
	if err != nil {
		in.log.Warn("read the installation's UID", "error", err)
	}
	outbox, err := in.spool.State()
	if err != nil && !errors.Is(err, spool.ErrClosed) {
		in.log.Error("read the spool's state", "error", err)
	}
	state, reason := in.state()
	return wire.Hello{
		Party: party, Boot: in.copies.boot(in.boot), Program: in.cfg.Version, Versions: wire.OwnVersions,
		Name: string(in.cfg.Name), Tags: in.cfg.Tags, Mode: string(in.cfg.Mode),
		State: state, Reason: reason, Installation: installation,
		Applied: in.desired.revision(), Policies: in.engine.Statuses(), Outbox: outbox,
		Revocations: number, Trust: trust, NotAfter: in.id.NotAfter(), RenewAfter: in.id.RenewAfter(), Upstreams: in.upstreams.status(),
		OS: runtime.GOOS, Arch: runtime.GOARCH, AsRoot: os.Geteuid() == 0,
		Time: time.Now().UTC(), Salt: in.salt,
	}
}

// about is what the target ping says.
func (in *instance) about() map[string]string {
	return map[string]string{"node": in.name(), "id": string(in.id.ID())}
}

// name is what people call the node.
func (in *instance) name() string { return firstOf(in.lock.name(), string(in.cfg.Name)) }
