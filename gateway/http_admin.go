package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// Parameters that several operations share are embedded structs; they are
// exported because huma fills no others.

// body is an answer.
type body[T any] struct {
	Body T
}

func answer[T any](v T) *body[T] { return &body[T]{Body: v} }

// tagged is an answer with an ETag.
type tagged[T any] struct {
	ETag string `header:"ETag"`
	Body T
}

// Match is the condition of a change: the ETag that the caller read.
type Match struct {
	IfMatch string `header:"If-Match" doc:"Refuse the change unless the object still has this ETag."`
}

// want returns the version that the caller expects; 0 means any.
func (m Match) want() (int64, error) {
	if m.IfMatch == "" || m.IfMatch == "*" {
		return 0, nil
	}
	v, err := strconv.ParseInt(unquote(m.IfMatch), 10, 64)
	if err != nil || v < 1 {
		return 0, api.NewProblem(api.CodeChanged, fmt.Sprintf("If-Match %q is no ETag of ours", wire.Quotable(m.IfMatch)))
	}
	return v, nil
}

func (m Match) check(version int64) error {
	want, err := m.want()
	if err == nil && want != 0 && want != version {
		err = store.ErrChanged
	}
	return err
}

func unquote(s string) string {
	if u, err := strconv.Unquote(s); err == nil {
		return u
	}
	return s
}

// Page selects one page of a list.
type Page struct {
	Cursor string `query:"cursor" doc:"The next of the page before." maxLength:"512"`
	Limit  int    `query:"limit" minimum:"1" maximum:"1000" default:"100"`
}

// before reads a cursor that is a position to continue below.
func (p Page) before() (int64, error) {
	if p.Cursor == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(p.Cursor, 10, 64)
	if err != nil || n < 1 {
		return 0, badCursor(p.Cursor)
	}
	return n, nil
}

func badCursor(c string) error {
	return api.NewProblem(api.CodeInvalid, fmt.Sprintf("cursor %q was not made by this list", wire.Quotable(c)))
}

// slice cuts one page out of a list that is in memory; the cursor is the key
// of the last item before it, so the list must be in the order of keys.
func slicePage[T any](items []T, p Page, key func(T) string) (out api.List[T], err error) {
	start := 0
	if p.Cursor != "" {
		b, err := base64.RawURLEncoding.DecodeString(p.Cursor)
		if err != nil {
			return out, badCursor(p.Cursor)
		}
		start = slices.IndexFunc(items, func(v T) bool { return key(v) == string(b) }) + 1
		byKey := func(a, b T) int { return cmp.Compare(key(a), key(b)) }
		switch {
		case start > 0:
		case slices.IsSortedFunc(items, byKey): // that one has left the list: go on behind where it was
			start, _ = slices.BinarySearchFunc(items, string(b), func(v T, at string) int { return cmp.Compare(key(v), at) })
		default:
			return out, api.NewProblem(api.CodeInvalid, "the list has changed at the cursor: begin again")
		}
	}
	end := min(start+p.Limit, len(items))
	out.Items = append([]T{}, items[start:end]...)
	if end < len(items) {
		out.Next = base64.RawURLEncoding.EncodeToString([]byte(key(items[end-1])))
	}
	return out, nil
}

// positions makes a page of items that were asked for with one to spare.
func positions[S, T any](rows []S, limit int, view func(S) T, pos func(S) int64) api.List[T] {
	out := api.List[T]{Items: make([]T, 0, len(rows))}
	for i, r := range rows {
		if i == limit {
			out.Next = strconv.FormatInt(pos(rows[i-1]), 10)
			break
		}
		out.Items = append(out.Items, view(r))
	}
	return out
}

func utc(t time.Time) time.Time { return t.UTC() }

// when is nil for a time that never was.
func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// ByID names an object by its ID, or by a beginning of it.
type ByID struct {
	ID string `path:"id" maxLength:"128"`
}

func (r *rest) adminRoutes() {
	handle(r, huma.Operation{OperationID: "about", Method: http.MethodGet, Path: "/about", Summary: "Which gateway answers, and who it thinks is asking"}, mayRead, r.about)
	handle(r, huma.Operation{OperationID: "token.list", Method: http.MethodGet, Path: "/tokens", Summary: "List API tokens, newest first"}, mayAdmin, r.listTokens)
	handle(r, huma.Operation{OperationID: "token.create", Method: http.MethodPost, Path: "/tokens", Summary: "Make an API token"}, mayAdmin, r.createToken)
	handle(r, huma.Operation{OperationID: "token.revoke", Method: http.MethodPost, Path: "/tokens/{id}/revoke", Summary: "Make an API token useless"}, mayAdmin, r.revokeToken)
	handle(r, huma.Operation{OperationID: "revocation.list", Method: http.MethodGet, Path: "/revocations", Summary: "List the keys that are not trusted any more, newest first"}, mayRead, r.listRevocations)
	handle(r, huma.Operation{OperationID: "audit.list", Method: http.MethodGet, Path: "/audit", Summary: "List the audit log, newest first"}, mayAdmin, r.listAudit)
}

func (r *rest) about(ctx context.Context, _ *struct{}) (*body[api.About], error) {
	inst, c := r.s.store.Installation(), askerFrom(ctx)
	return answer(api.About{
		Version: r.s.cfg.Program, ID: string(r.s.id.ID()), TrustDomain: r.s.id.TrustDomain(), Installation: inst.UID, Generation: inst.Generation,
		Started: utc(r.s.started), Caller: c.actor.Who, Role: c.role,
	}), nil
}

// Bounds on the life of an API token.
const (
	minTokenTTL = time.Minute
	maxTokenTTL = 5 * 366 * 24 * time.Hour
)

func (r *rest) createToken(ctx context.Context, in *body[api.CreateToken]) (*body[api.CreatedToken], error) {
	if !slices.Contains(api.Roles, in.Body.Role) {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("unknown role %q (want viewer, operator, admin or certificate-officer)", wire.Quotable(string(in.Body.Role))))
	}
	if ttl := in.Body.TTL.Std(); ttl < minTokenTTL || ttl > maxTokenTTL {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("ttl %s: a token lives at least 1m and at most 5 years", in.Body.TTL))
	}
	if len(in.Body.Name) > 128 {
		return nil, api.NewProblem(api.CodeInvalid, "the name is longer than 128 characters")
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, err
	}
	text := tokenPrefix + base64.RawURLEncoding.EncodeToString(secret)
	t := &store.Token{ID: string(wire.NewID()), Name: in.Body.Name, Role: string(in.Body.Role), Hash: hashSecret(text), CreatedBy: store.ActorFrom(ctx).Who}
	err := r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		t.ExpiresAt = tx.Now().Add(in.Body.TTL.Std())
		tx.Audit(ctx, "token.create", "token "+t.ID, fmt.Sprintf("role %s, ttl %s", t.Role, in.Body.TTL))
		return tx.AddToken(ctx, t)
	})
	if err != nil {
		return nil, err
	}
	return answer(api.CreatedToken{Token: tokenView(t), Secret: text}), nil
}

func tokenView(t *store.Token) api.Token {
	return api.Token{ID: t.ID, Name: t.Name, Role: api.Role(t.Role), State: tokenState(t, time.Now()), Created: utc(t.CreatedAt), Expires: utc(t.ExpiresAt),
		LastUsed: when(t.LastUsed), CreatedBy: t.CreatedBy}
}

func (r *rest) listTokens(ctx context.Context, in *Page) (*body[api.List[api.Token]], error) {
	rows, err := r.s.store.Tokens(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.Token, len(rows))
	for i, t := range rows {
		out[i] = tokenView(t)
	}
	list, err := slicePage(out, *in, func(t api.Token) string { return t.ID })
	return answer(list), err
}

func (r *rest) revokeToken(ctx context.Context, in *ByID) (*body[api.Token], error) {
	tokens, err := r.s.store.Tokens(ctx)
	if err != nil {
		return nil, err
	}
	t, err := pick("token", in.ID, true, tokens, func(t *store.Token) (string, string) { return t.ID, t.Name })
	if err != nil {
		return nil, err
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "token.revoke", "token "+t.ID, "")
		if err := errors.Join(tx.RevokeToken(ctx, t.ID), tx.EndForwards(ctx)); err != nil {
			return err
		}
		t, err = tx.Token(ctx, t.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.tokens.cut(t.ID)
	return answer(tokenView(t)), nil
}

type auditInput struct {
	Page
	Who   string    `query:"who" maxLength:"128"`
	What  string    `query:"what" maxLength:"128"`
	Since time.Time `query:"since"`
}

func (r *rest) listAudit(ctx context.Context, in *auditInput) (*body[api.List[api.AuditEntry]], error) {
	before, err := in.before()
	if err != nil {
		return nil, err
	}
	rows, err := r.s.store.AuditLog(ctx, store.AuditFilter{Who: in.Who, What: in.What, Since: in.Since, Before: before, Limit: in.Limit + 1})
	if err != nil {
		return nil, err
	}
	return answer(positions(rows, in.Limit, func(e store.AuditEntry) api.AuditEntry {
		return api.AuditEntry{Pos: e.Pos, Time: utc(e.Time), Who: e.Who, From: e.Origin, What: e.What, Object: e.Object, Result: e.Result, Detail: e.Detail}
	}, func(e store.AuditEntry) int64 { return e.Pos })), nil
}
