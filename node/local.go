package node

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"sallyport/config"
	"sallyport/internal/doctor"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// Status is what the local socket shows. With one instance, the node's own
// members are that instance's.
func (a *Agent) Status(context.Context) local.Status {
	s := local.Status{
		Role: wire.RoleNode, Name: string(a.cfg.Name), State: string(wire.StatePending), Reason: a.noGateway().Error(),
		Upstreams: []wire.UpstreamStatus{}, Instances: []local.Instance{}, Version: a.cfg.Version, Started: a.started, Boot: a.boot,
	}
	if a.addr != nil {
		s.Listen = []string{a.addr.String()}
	}
	for i, in := range a.all() {
		v := in.status()
		s.Instances = append(s.Instances, v)
		s.Upstreams = append(s.Upstreams, v.Upstreams...)
		s.Outbox.Depth += v.Outbox.Depth
		s.Outbox.Dropped += v.Outbox.Dropped
		if o := v.Outbox.Oldest; o != nil && (s.Outbox.Oldest == nil || o.Before(*s.Outbox.Oldest)) {
			s.Outbox.Oldest = o
		}
		for addr := range in.upstreams.targets() {
			s.DialTargets = append(s.DialTargets, addr)
		}
		// The first instance speaks for the node, until another is worse off.
		if i == 0 || s.State == string(wire.StateRunning) && v.State != string(wire.StateRunning) {
			s.ID, s.Name, s.Fingerprint, s.State, s.Reason = v.ID, v.Name, v.Fingerprint, v.State, v.Reason
			s.TrustDomain, s.NotAfter, s.Clock, s.Boot = v.TrustDomain, v.NotAfter, v.Clock, v.Boot
		}
	}
	return s
}

func (in *instance) status() local.Instance {
	h := in.hello()
	policies := h.Policies
	if policies == nil {
		policies = []wire.PolicyStatus{}
	}
	outbox := local.Outbox{Depth: h.Outbox.Depth, Dropped: h.Outbox.Dropped}
	if !h.Outbox.Oldest.IsZero() {
		outbox.Oldest = &h.Outbox.Oldest
	}
	if in.quarantined() && h.State != wire.StateLocked {
		h.State, h.Reason = wire.StateQuarantined, whyQuarantined
	}
	return local.Instance{
		TrustDomain: in.td, ID: in.id.ID(), Name: in.name(), Fingerprint: in.id.Fingerprint(), State: string(h.State), Reason: h.Reason,
		Installation: h.Installation, AppliedRevision: h.Applied.String(), Policies: policies, Upstreams: h.Upstreams,
		Outbox: outbox, NotAfter: h.NotAfter, Clock: in.clock.Skew(), Boot: h.Boot,
	}
}

// SendEvent stores a local user's event, for one gateway or for all.
func (a *Agent) SendEvent(_ context.Context, q local.EventRequest) (local.EventReceipt, error) {
	e := wire.Event{Severity: q.Severity, Application: q.Application, Object: q.Object, Key: q.Key, Text: q.Text}
	if err := e.Validate(); err != nil {
		return local.EventReceipt{}, &local.Error{Code: local.CodeInvalid, Message: err.Error()}
	}
	targets, err := a.pick(q.Instance)
	if err != nil {
		return local.EventReceipt{}, err
	}
	var receipt local.EventReceipt
	var failed []string
	for _, in := range targets { // one that cannot keep it must not keep it from the others
		stored, err := in.spool.Append(e)
		if err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v", in.td, err))
			continue
		}
		st, err := in.spool.State()
		if err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v", in.td, err))
			continue
		}
		receipt.Stored = append(receipt.Stored, local.StoredEvent{Instance: in.td, ID: stored[0].ID, Spool: st.Spool, Seq: stored[0].Seq})
	}
	if len(failed) > 0 {
		return receipt, &local.Error{Code: local.CodeUnavailable, Message: strings.Join(failed, "; ")}
	}
	return receipt, nil
}

// pick finds instances by trust domain; empty means all.
func (a *Agent) pick(td string) ([]*instance, error) {
	all := a.all()
	if td == "" && len(all) > 0 {
		return all, nil
	}
	var names []string
	for _, in := range all {
		if in.td == td {
			return []*instance{in}, nil
		}
		names = append(names, in.td)
	}
	if len(all) == 0 {
		return nil, &local.Error{Code: local.CodeUnavailable, Message: a.noGateway().Error()}
	}
	return nil, &local.Error{Code: local.CodeNotFound, Message: fmt.Sprintf("no instance %q; there are %s", wire.Quotable(td), strings.Join(names, ", "))}
}

// Unlock makes an instance obey the verified gateway that comes next.
func (a *Agent) Unlock(_ context.Context, td string) error {
	targets, err := a.pick(td)
	if err != nil {
		return err
	}
	var locked []*instance
	for _, in := range targets {
		if in.lock.locked() != "" {
			locked = append(locked, in)
		}
	}
	switch {
	case len(locked) == 0:
		return &local.Error{Code: local.CodeRefused, Message: "the node is not locked"}
	case len(locked) > 1:
		return &local.Error{Code: local.CodeRefused, Message: "several instances are locked: name one"}
	}
	if err := locked[0].lock.unlock(""); err != nil {
		return err
	}
	locked[0].log.Warn("unlocked on the node itself")
	locked[0].signals.kick()
	return nil
}

// Join takes a join code that an operator hands over; it may be the first of
// another gateway.
func (a *Agent) Join(_ context.Context, code string) error {
	c, err := wire.ParseJoinCode(code)
	switch {
	case err != nil:
		return &local.Error{Code: local.CodeInvalid, Message: err.Error()}
	case c.Role != wire.RoleNode:
		return &local.Error{Code: local.CodeRefused, Message: fmt.Sprintf("join code is for a %s, this is a node: make one with `sallyport join create`", c.Role)}
	case !wire.ValidTrustDomain(c.TrustDomain):
		return &local.Error{Code: local.CodeInvalid, Message: "join code: its trust domain is no name"}
	}
	if all := a.all(); len(all) > 0 && a.servesOnly(all[0].td, c.TrustDomain) {
		return &local.Error{Code: local.CodeRefused, Message: fmt.Sprintf("join code for %s: %v", c.TrustDomain, errListens(all[0].td))}
	}
	if err := a.join.Keep(code); err != nil {
		return err
	}
	select {
	case a.look <- struct{}{}:
	default:
	}
	return nil
}

// Doctor is what the node finds out about itself without asking anybody.
func (a *Agent) Doctor(context.Context) []local.Check {
	all := a.all()
	if len(all) == 0 {
		return []local.Check{{Check: "identity", Detail: a.noGateway().Error(), Fix: "put a join code where SALLYPORT_NODE_JOIN points, or run `sallyport local join CODE-FILE`: no restart is needed"}}
	}
	var checks []local.Check
	for _, in := range all {
		for _, c := range in.doctor(func(addr string) string { return a.served(addr, in) }) {
			if len(all) > 1 {
				c.Check = in.td + ": " + c.Check
			}
			checks = append(checks, c)
		}
	}
	return append(checks, a.checkBounds())
}

// served is the trust domain of an instance, other than one, that is connected at
// an address.
func (a *Agent) served(addr string, but *instance) string {
	for _, in := range a.all() {
		if in != but && slices.Contains(in.upstreams.connected(), addr) {
			return in.td
		}
	}
	return ""
}

// doctor is what the instance finds out about itself; served names the world of
// another one that is connected at an address.
func (in *instance) doctor(served func(addr string) string) []local.Check {
	checks := []local.Check{
		doctor.Enrolled(in.id, fmt.Sprintf("node %s of %s", in.id.ID(), in.td), in.applicant.Ready(), "sallyport join create"),
		doctor.Certificate(in.id.NotAfter(), in.id.RenewAfter(), time.Now(), "this node"),
	}
	if in.quarantined() {
		checks = append(checks, local.Check{Check: "quarantine", Detail: whyQuarantined,
			Fix: fmt.Sprintf("on the gateway: `sallyport node reidentify %s --boot %s` gives this host an identity of its own, or stop one of the two; then `sallyport node resume %[1]s`", in.name(), in.copies.boot(in.boot))})
	}
	checks = append(checks, in.checkUpstreams(served)...)
	return append(checks, in.checkLock(), in.checkPolicies(), in.checkSpool())
}

func (in *instance) checkUpstreams(served func(addr string) string) []local.Check {
	var checks []local.Check
	waits, enrolling := in.applicant.Ready() != nil, false
	for _, u := range in.upstreams.status() {
		c := doctor.Channel(u, waits)
		if td := served(u.Address); !c.OK && td != "" { // SALLYPORT_NODE_UPSTREAMS holds for all instances
			c = local.Check{Check: c.Check, OK: true, Detail: "it leads to " + td + ", whose gateway this node serves too"}
		} else if !c.OK && in.upstreams.up() > 0 && in.upstreams.unlisted(u.Address) {
			c.OK, c.Warning = true, true
			c.Fix = "nothing has to be done: the others are used, and it is tried now and then, for the day on which none of them answers; SALLYPORT_NODE_UPSTREAMS, if set, names all that is dialled"
		}
		checks = append(checks, c)
		enrolling = enrolling || waits && u.State == "enrolling"
	}
	c := local.Check{Check: "upstreams", OK: in.upstreams.up() > 0, Detail: fmt.Sprintf("%d channels", in.upstreams.up())}
	switch {
	case c.OK:
	case enrolling:
		c.Fix = "see identity: the way is there, and the certificate is not"
	default:
		c.Fix = "the addresses come from SALLYPORT_NODE_UPSTREAMS, else from the join code and the gateway"
	}
	return append(checks, c)
}

func (in *instance) checkLock() local.Check {
	if why := in.lock.locked(); why != "" {
		return local.Check{Check: "lock", Detail: why, Fix: "`sallyport local unlock` obeys the next verified gateway"}
	}
	uid, err := in.lock.installation()
	if err != nil {
		return local.Check{Check: "lock", Detail: err.Error(), Fix: "make the uid file readable for the agent"}
	}
	return local.Check{Check: "lock", OK: true, Detail: "obeys installation " + firstOf(uid, "that comes first")}
}

func (in *instance) checkPolicies() local.Check {
	c := local.Check{Check: "policies", OK: true}
	statuses := in.engine.Statuses()
	var failed []string
	for _, p := range statuses {
		if p.State == wire.PolicyFailed {
			failed = append(failed, fmt.Sprintf("%s (%s)", p.Name, p.Error))
		}
	}
	c.Detail = fmt.Sprintf("revision %v, %d policies", in.desired.revision(), len(statuses))
	if len(failed) > 0 {
		c.OK, c.Detail = false, c.Detail+"; failed: "+strings.Join(failed, "; ")
		c.Fix = "what was applied before is kept; correct the policy on the gateway, or the host, and it is tried again"
	}
	return c
}

func (in *instance) checkSpool() local.Check {
	st, err := in.spool.State()
	if err != nil {
		return local.Check{Check: "spool", Detail: err.Error(), Fix: "check the data directory"}
	}
	c := local.Check{Check: "spool", OK: st.Dropped == 0, Detail: fmt.Sprintf("%d events wait, %d bytes on disk, %d dropped by quota", st.Depth, in.spool.Size(), st.Dropped)}
	if !c.OK {
		c.Fix = "the node was cut off for longer than its quota lasts: raise SALLYPORT_NODE_SPOOL_MAX"
	}
	return c
}

// checkBounds says what any gateway may ask of this host.
func (a *Agent) checkBounds() local.Check {
	show := func(globs []string) string { return firstOf(strings.Join(globs, ";"), "none") }
	c := local.Check{Check: "bounds", OK: true, Detail: fmt.Sprintf("mode %s; actions run %s; policies run %s and write %s",
		a.cfg.Mode, show(a.cfg.AllowCommands), show(a.cfg.AllowPolicyCommands), show(a.cfg.AllowPaths))}
	if a.cfg.AllowCommands.Any() {
		c.Detail += "; a gateway may run anything here as the agent's user"
		if os.Geteuid() == 0 && a.cfg.Mode == config.Managed {
			c.Warning, c.Detail = true, c.Detail+", which is root"
			c.Fix = "name the programs that actions may run in SALLYPORT_NODE_ALLOW_COMMANDS, or run the agent as a user of its own"
		}
	}
	return c
}

// Instances of the node.
func (a *Agent) Instances(context.Context) ([]local.Instance, error) {
	out := []local.Instance{}
	for _, in := range a.all() {
		out = append(out, in.status())
	}
	return out, nil
}

var _ interface {
	local.Role
	local.EventSender
	local.Unlocker
	local.Joiner
} = (*Agent)(nil)
