package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// rollingCA is the authority in memory, as one whose issuers can be changed.
type rollingCA struct {
	*memoryCA
	state wire.CAState
	env   *wire.Envelope
	above int64 // what the number of the next list of roots was told to be above
	fail  error // why a step is not taken, as far as anybody knows
}

func (c *rollingCA) State() wire.CAState { return c.state }

func (c *rollingCA) Trust() (wire.Envelope, bool) {
	if c.env == nil {
		return wire.Envelope{}, false
	}
	return *c.env, true
}

func (c *rollingCA) Rotate(_ context.Context, _ string, atLeast int64) (wire.CAState, error) {
	c.above = atLeast
	return c.state, nil
}
func (c *rollingCA) Follow(context.Context, []byte, bool, int64) (wire.CAState, error) {
	return c.state, nil
}
func (c *rollingCA) Abort(context.Context, int64) (wire.CAState, error)        { return c.state, c.fail }
func (c *rollingCA) Finish(context.Context, bool, int64) (wire.CAState, error) { return c.state, nil }

// rolls gives the desk an authority whose first intermediate is the one that
// has signed so far.
func (d *desk) rolls() *rollingCA {
	ca := &rollingCA{memoryCA: d.ca, state: wire.CAState{TrustDomain: d.ca.TrustDomain,
		Roots:         []wire.CAIssuer{{N: 1, Key: wire.KeyOf(d.ca.Root()), State: wire.IssuerIssuing}},
		Intermediates: []wire.CAIssuer{{N: 1, Root: 1, Key: wire.KeyOf(d.ca.Inter), State: wire.IssuerIssuing}}}}
	d.enrolment.ca = ca
	return ca
}

// rotated makes another intermediate the issuing one, as far as the state says.
func (c *rollingCA) rotated() {
	c.state.Intermediates[0].State = wire.IssuerTrusted
	c.state.Intermediates = append(c.state.Intermediates, wire.CAIssuer{N: 2, Root: 1, Key: wire.KeyHash(strings.Repeat("ab", 32)), State: wire.IssuerIssuing})
}

func TestPartiesAreMovedOntoTheIssuingIntermediate(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca := d.rolls()
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	hello := &wire.Hello{Party: party, RenewAfter: time.Now().Add(time.Hour)}
	if err := d.renewDue(t.Context(), party.ID, hello); err != nil || len(d.told[party.ID]) != 0 {
		t.Errorf("renewed without a rollover: %v %v", err, d.told[party.ID])
	}
	held, err := d.store.PartyTrust(t.Context(), party.ID)
	if err != nil || held.Issuer != wire.KeyOf(d.ca.Inter) {
		t.Errorf("noted %+v, %v", held, err)
	}
	ca.rotated()
	asked := 0
	d.answer = func(_ wire.Party, _, path string, in, out any) error {
		switch path {
		case wire.PathCSR:
			asked++
			der, err := a.id.CSR(false)
			out.(*wire.CSR).DER = der
			return err
		case wire.PathCertificate:
			return a.id.Install(in.(wire.Certificate).Chain)
		}
		return nil
	}
	if err := d.renewDue(t.Context(), party.ID, hello); err != nil || asked != 1 {
		t.Errorf("a leaf of the old intermediate: asked %d times, %v", asked, err)
	}
	// Once its leaf is noted as one of the issuing intermediate, it is left alone.
	err = d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.SetIssuer(ctx, party, ca.state.Issuing().Key)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.renewDue(t.Context(), party.ID, hello); err != nil || asked != 1 {
		t.Errorf("a leaf of the new one: asked %d times, %v", asked, err)
	}
}

func TestTrustDocumentIsDelivered(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca := d.rolls()
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	if err := d.deliverTrust(t.Context(), party.ID, &wire.Hello{Party: party}); err != nil || len(d.told[party.ID]) != 0 {
		t.Errorf("there is none yet: %v %v", err, d.told[party.ID])
	}
	env := d.ca.Seal(t, wire.TypeTrust, wire.Trust{TrustDomain: d.ca.TrustDomain, Number: 4, Issued: time.Now().UTC(), Roots: [][]byte{d.ca.Root().Raw}})
	ca.env = &env
	d.answer = func(_ wire.Party, method, path string, in, _ any) error {
		if method != http.MethodPut || path != wire.PathTrust {
			t.Errorf("%s %s", method, path)
		}
		_, err := a.id.ApplyTrust(in.(wire.Envelope))
		return err
	}
	if err := d.deliverTrust(t.Context(), party.ID, &wire.Hello{Party: party}); err != nil {
		t.Fatal(err)
	}
	held, err := d.store.PartyTrust(t.Context(), party.ID)
	if n, _ := a.id.Trust(); err != nil || n != 4 || held.Trust != 4 || held.Issuer == "" {
		t.Errorf("it holds %d, noted %+v, %v", n, held, err)
	}
	// One that has it, and one that has a newer one, are not told.
	for _, n := range []int64{4, 5} {
		if err := d.deliverTrust(t.Context(), party.ID, &wire.Hello{Party: party, Trust: n}); err != nil || len(d.told[party.ID]) != 1 {
			t.Errorf("holder of %d: %v %v", n, err, d.told[party.ID])
		}
	}
	// A party that enrols gets it with its certificate.
	b := d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	if n, _ := b.id.Trust(); n != 4 {
		t.Errorf("a new party holds %d", n)
	}
}

func TestGivenUpIntermediateIsInEverySet(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca := d.rolls()
	if err := d.publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, ok := ca.Revocations(); ok {
		t.Fatal("a set that names nobody")
	}
	ca.rotated()
	gone := wire.CAIssuer{N: 1, Root: 1, Key: wire.KeyHash(strings.Repeat("cd", 32)), State: wire.IssuerRetired, Retired: time.Now().UTC(), NotAfter: time.Now().Add(time.Hour)}
	ca.state.Intermediates[0] = gone
	for range 2 { // the second time there is nothing new
		if err := d.publish(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	env, _ := ca.Revocations()
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		t.Fatal(err)
	}
	if set.Number != 1 || len(set.Revoked) != 1 || set.Revoked[0].Key != gone.Key || !d.id.Revoked(gone.Key) {
		t.Errorf("the set is %+v", set)
	}
	// A restart merges the set that we hold: the authority's own knowledge is not
	// made a party of.
	if err := d.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.store.Key(t.Context(), gone.Key); err == nil {
		t.Error("the intermediate stands among the keys of parties")
	}
}

// TestListsOfARestoredAuthorityAreNewer: parties may hold lists of roots that
// were signed after the backup. One of the same number would be taken for the
// one that they have, and the rollover for done (PK-10, HA-07).
func TestListsOfARestoredAuthorityAreNewer(t *testing.T) {
	t.Parallel()
	for restorations, want := range []int64{0, trustsOfAGeneration, 2 * trustsOfAGeneration} {
		w := newWorld(t)
		for range restorations {
			if err := w.db.RaiseGeneration(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
		}
		d := newDesk(t)
		ca := d.rolls()
		w.before = func(s *Server) { s.enrolment.ca = ca }
		w.run()
		if _, err := w.s.rotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot}); err != nil {
			t.Fatal(err)
		}
		if ca.above != want {
			t.Errorf("after %d restorations lists are numbered above %d, want %d", restorations, ca.above, want)
		}
		w.stop()
	}
}

// TestAbortSaysWhichWayItGoes: a second one begins the rollover again.
func TestAbortSaysWhichWayItGoes(t *testing.T) {
	t.Parallel()
	for aborted, want := range map[bool]string{false: "the rollover goes back", true: "goes on now"} {
		w := newWorld(t)
		ca := newDesk(t).rolls()
		ca.state.Rollover = &wire.CARollover{Kind: wire.RolloverIntermediate, Aborted: aborted} // before the server reads it
		w.before = func(s *Server) { s.enrolment.ca = ca }
		w.run()
		if c, err := w.s.abortCA(t.Context()); err != nil || len(c.Notes) != 1 || !strings.Contains(c.Notes[0], want) {
			t.Errorf("aborted before %v: %q, %v", aborted, c.Notes, err)
		}
		w.stop()
	}
}

// TestLostAnswerOfAStep: a step whose answer was lost may have been taken. Who is
// told that it was not repeats an abort, which turns the rollover round again.
func TestLostAnswerOfAStep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := newDesk(t).rolls()
	ca.state.Rollover = &wire.CARollover{Kind: wire.RolloverIntermediate}
	w.before = func(s *Server) { s.enrolment.ca = ca }
	w.run()
	defer w.stop()
	for _, c := range []struct {
		fail error
		lost bool
		code api.Code
	}{
		{&url.Error{Op: "Post", URL: "https://pki/v1/rollover", Err: io.EOF}, true, api.CodeUnavailable},
		{&url.Error{Op: "Post", URL: "https://pki/v1/rollover", Err: context.DeadlineExceeded}, true, api.CodeUnavailable},
		{&url.Error{Op: "Post", URL: "https://pki/v1/rollover", Err: &net.OpError{Op: "dial", Err: io.EOF}}, false, api.CodeUnavailable},
		{fmt.Errorf("%w: finish it first", wire.ErrRollover), false, api.CodeConflict},
		{errors.New("write issuers.json: no space left on device"), false, api.CodeUnavailable},
	} {
		ca.fail = c.fail
		_, err := w.s.abortCA(t.Context())
		if err == nil || strings.Contains(err.Error(), "may have changed") != c.lost || codeOfError(err) != c.code {
			t.Errorf("%v: %v", c.fail, err)
		}
	}
}

// TestNoStepWithoutATrace: where the audit log cannot be written, the authority is not
// asked to change its issuers.
func TestNoStepWithoutATrace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.db.RaiseGeneration(t.Context(), 0); err != nil { // so that who is asked is told a number
		t.Fatal(err)
	}
	ca := newDesk(t).rolls()
	w.before = func(s *Server) { s.enrolment.ca = ca }
	w.run()
	defer w.stop()
	sql := func(text string) {
		t.Helper()
		err := sqldb.Beside(t.Context(), filepath.Join(w.dir, "sallyport.db"), func(ctx context.Context, tx bun.Tx) error {
			_, err := tx.ExecContext(ctx, text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	sql("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no room'); END")
	if _, err := w.s.rotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot}); err == nil || ca.above != 0 {
		t.Errorf("a step that cannot be audited: %v, the authority was asked: %t", err, ca.above != 0)
	}
	sql("DROP TRIGGER full")
	if _, err := w.s.rotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot}); err != nil || ca.above == 0 {
		t.Errorf("with room again: %v", err)
	}
	if rows := auditOf(t, w.db, "ca.rotate"); len(rows) != 2 {
		t.Errorf("audit %v", rows)
	}
}

// unsigning is an authority that takes steps, and is away otherwise.
type unsigning struct{ *rollingCA }

func (unsigning) SignRevocations(context.Context, wire.Revocations, int64) (wire.Envelope, error) {
	return wire.Envelope{}, &url.Error{Op: "Post", URL: "https://pki/v1/revocations", Err: io.EOF}
}

func (unsigning) Issue(context.Context, wire.IssueRequest) ([][]byte, error) {
	return nil, &url.Error{Op: "Post", URL: "https://pki/v1/issue", Err: io.EOF}
}

// TestStepIsTakenAndNotSpreadYet: who is told that the gateway failed repeats it.
func TestStepIsTakenAndNotSpreadYet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := newDesk(t).rolls()
	ca.state.Rollover = &wire.CARollover{Kind: wire.RolloverIntermediate}
	ca.state.Intermediates = append(ca.state.Intermediates, wire.CAIssuer{N: 2, Root: 1, Key: wire.KeyHash(strings.Repeat("ab", 32)), State: wire.IssuerRetired, NotAfter: time.Now().Add(time.Hour)})
	w.before = func(s *Server) { s.enrolment.ca = unsigning{ca} }
	w.run()
	defer w.stop()
	if _, err := w.s.abortCA(t.Context()); err == nil || !strings.Contains(err.Error(), "the issuers are changed") || codeOfError(err) != api.CodeUnavailable {
		t.Errorf("%v", err)
	}
}

// TestRotationSaysWhomItLoses: three roots vouch at most. A party that missed two
// changes of the root comes back as long as the third is not begun, and the
// rehearsal of that says so (PK-10).
func TestRotationSaysWhomItLoses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := newDesk(t).rolls()
	old := ca.state.Roots[0].Key
	ca.state.Roots, ca.state.Intermediates = nil, nil
	for n := 1; n <= wire.MaxRoots; n++ {
		i := wire.CAIssuer{N: n, Root: n, Key: wire.KeyHash(strings.Repeat(fmt.Sprint(n), 64)), State: wire.IssuerRetired, NotAfter: time.Now().Add(time.Hour)}
		if n == wire.MaxRoots {
			i.State = wire.IssuerIssuing
		}
		ca.state.Intermediates = append(ca.state.Intermediates, i)
		i.Root, i.Key = 0, wire.KeyHash(strings.Repeat(fmt.Sprint(n), 63)+"a")
		if n == 1 {
			i.Key = old
		}
		ca.state.Roots = append(ca.state.Roots, i)
	}
	w.before = func(s *Server) { s.enrolment.ca = unsigning{ca} }
	w.update(func(ctx context.Context, tx *store.Tx) error {
		for n, i := range ca.state.Intermediates {
			id := wire.NewID()
			party := wire.Party{Role: wire.RoleNode, ID: id, TrustDomain: ca.state.TrustDomain}
			err := errors.Join(tx.AddNode(ctx, &store.Node{ID: id, Name: fmt.Sprintf("web-%d", n+1), State: wire.StateDown, KeyHash: wire.HashSPKI([]byte(id)), NotAfter: time.Now().Add(time.Hour)}),
				tx.SetIssuer(ctx, party, i.Key),
				tx.AddJoin(ctx, &store.Join{ID: string(id), Role: wire.RoleNode, Tenant: store.DefaultTenant, MaxUses: 1, ExpiresAt: time.Now().Add(time.Hour), Root: ca.state.Roots[n].Key, Generation: 1}))
			if err != nil {
				return err
			}
		}
		return nil
	})
	w.run()
	defer w.stop()
	told := func(what string) (lost []string, joins int, notes string) {
		t.Helper()
		c, err := w.s.rehearse(t.Context(), ca.state, what)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range c.Offline {
			if p.Lost {
				lost = append(lost, p.Name)
			}
		}
		return lost, lostJoins(c.Joins), strings.Join(c.Notes, "\n")
	}
	if lost, joins, notes := told(wire.RolloverIntermediate); len(lost) != 0 || joins != 0 || strings.Contains(notes, "lost") {
		t.Errorf("of another intermediate: %q, %d join codes: %s", lost, joins, notes)
	}
	lost, joins, notes := told(wire.RolloverRoot)
	if !slices.Equal(lost, []string{"web-1"}) || joins != 1 || !strings.Contains(notes, "1 parties are lost by this") || !strings.Contains(notes, "3 parties get a new leaf: 1 at once, 2 when they come back") ||
		!strings.Contains(notes, "1 open join codes pin a root that vouches for nothing") || !strings.Contains(notes, "2 open join codes pin the root that would be given up") {
		t.Errorf("of another root: %q, %d join codes: %s", lost, joins, notes)
	}
	then := ca.state // when it is done
	then.Roots, then.Rollover = slices.Clone(then.Roots), &wire.CARollover{Kind: wire.RolloverRoot}
	then.Roots[0].Forgotten = true
	view, err := w.s.caView(t.Context(), then)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range view.Left {
		if p.Lost != (p.Name == "web-1") {
			t.Errorf("%s is lost: %v, %s", p.Name, p.Lost, p.Reason)
		}
	}
	if notes := strings.Join(finishNotes(view, false), "\n"); !strings.Contains(notes, "1 that missed this") || !strings.Contains(notes, "join codes pin a root that vouches for nothing") {
		t.Errorf("notes of finish: %s", notes)
	}
}
