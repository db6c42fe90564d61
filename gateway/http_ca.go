package gateway

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
)

func (r *rest) caRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("ca.show", http.MethodGet, "/ca", "Show the issuers of certificates, and who is not on the issuing one"), mayRead, r.showCA)
	handle(r, op("ca.rotate", http.MethodPost, "/ca/rotate", "Replace the intermediate, or the root with it"), mayCertify, r.rotateCA)
	handle(r, op("ca.finish", http.MethodPost, "/ca/finish", "Trust what was replaced no longer"), mayCertify, r.finishCA)
	handle(r, op("ca.abort", http.MethodPost, "/ca/abort", "Turn a rollover round"), mayCertify, r.abortCA)
}

func (r *rest) showCA(ctx context.Context, _ *struct{}) (*body[api.CA], error) {
	out, err := r.s.showCA(ctx)
	return answer(out), err
}

func (r *rest) rotateCA(ctx context.Context, in *body[api.RotateCA]) (*body[api.CAChange], error) {
	return changedCA(r.s.rotateCA(ctx, in.Body))
}

func (r *rest) finishCA(ctx context.Context, in *body[api.FinishCA]) (*body[api.CAChange], error) {
	return changedCA(r.s.finishCA(ctx, in.Body))
}

func (r *rest) abortCA(ctx context.Context, _ *struct{}) (*body[api.CAChange], error) {
	return changedCA(r.s.abortCA(ctx))
}

// changedCA sends lists that are never null.
func changedCA(c api.CAChange, err error) (*body[api.CAChange], error) {
	if c.Offline == nil {
		c.Offline = []api.CAParty{}
	}
	if c.Joins == nil {
		c.Joins = []api.CAJoin{}
	}
	if c.Certificates == nil {
		c.Certificates = []api.Certificate{}
	}
	if c.Notes == nil {
		c.Notes = []string{}
	}
	return answer(c), err
}
