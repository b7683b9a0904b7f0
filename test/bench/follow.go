package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// How long a fleet takes to follow a release. Ours is a campaign of one phase, in which
// each simulated device checks the signed metadata and the log of releases, fetches
// the part to disk, begins a new session as the new version, and reports. The baseline
// is the same files over HTTPS with client certificates, from a file server that is a
// process of its own: each device fetches what it fetched of ours, and throws it away.

const (
	followVersion = "1.1.0"
	followPart    = 64 << 10 // bytes
)

func followRow(ctx context.Context, t *table) (err error) {
	dir, err := os.MkdirTemp("", "deimos-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	opened, err := newOurSide(dir)
	if err != nil {
		return err
	}
	s := opened.(*ourSide)
	k := &testbed.Followers{Dir: filepath.Join(dir, "devices")}
	s.does, s.beat = k.Does, 5*time.Second
	if err := s.start(ctx); err != nil {
		return err
	}
	defer s.close()
	keys, files := filepath.Join(dir, "keys"), filepath.Join(dir, "repo")
	deimos := func(args ...string) error {
		c := exec.CommandContext(ctx, filepath.Join(*bin, "deimos"), args...)
		c.Env = append(os.Environ(), "DEIMOS_CONTEXT="+filepath.Join(dir, "coordinator", "operator.json"))
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("deimos %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	packed, bundle := make([]byte, followPart), filepath.Join(dir, "bundle")
	rand.Read(packed)
	err = errors.Join(
		deimos("release", "keys", "init", "--keys", keys),
		deimos("release", "publish", "--keys", keys, "--repo", files), // devices get the root as they enrol
		testbed.ToyBundle(bundle, followVersion, packed),
	)
	if err == nil {
		err = s.connect(ctx, *fleet)
	}
	if err == nil {
		err = deimos("release", "publish", "--keys", keys, "--repo", files, "--bundle", bundle)
	}
	if err != nil {
		return err
	}
	began := time.Now()
	c, err := s.client.StartCampaign(ctx, api.CampaignRequest{Version: followVersion, Selector: api.Selector{All: true}, Rate: 1000, Phases: []api.CampaignPhase{{Percentage: 100}}})
	if err != nil {
		return err
	}
	for c.State != api.CampaignDone {
		if c.State.Ended() {
			return fmt.Errorf("the campaign was %s: %s", c.State, c.Reason)
		}
		if err := rest(ctx, 100*time.Millisecond); err != nil {
			return err
		}
		if c, err = s.client.Campaign(ctx, c.ID); err != nil {
			return err
		}
	}
	ours := time.Since(began)
	if n := c.Counts[api.StandsUpdated]; n != *fleet {
		return fmt.Errorf("%d of %d devices follow: %v", n, *fleet, c.Counts)
	}
	paths := k.All()[0].Paths()
	s.close()
	base, err := bareFetch(ctx, files, paths, *fleet)
	if err != nil {
		return fmt.Errorf("the baseline: %w", err)
	}
	t.row(fmt.Sprintf("%d devices follow (HTTPS alone)", *fleet), "s", ours.Seconds(), base.Seconds(), "%.1f")
	return nil
}

// bareFetch is how long n devices take to fetch these files.
func bareFetch(ctx context.Context, files string, paths []string, n int) (time.Duration, error) {
	dir := filepath.Join(filepath.Dir(files), "bare")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	if err := newCA(dir); err != nil {
		return 0, err
	}
	ca, err := loadCA(dir)
	if err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	server, err := startChild(self, "bare-files", dir, files)
	if err != nil {
		return 0, err
	}
	defer server.kill()
	addr, err := server.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("the file server ended: %w", err)
	}
	addr = strings.TrimSpace(addr)
	certs := make([]tls.Certificate, n) // devices of ours have theirs, too
	for i := range certs {
		key := newKey()
		if certs[i], err = ca.sign(pkix.Name{CommonName: string(wire.IDOf(key.Public().(ed25519.PublicKey)))}, key); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	var g errgroup.Group
	g.SetLimit(connectAtOnce)
	for i := range n {
		g.Go(func() error {
			tr := &http.Transport{TLSClientConfig: &tls.Config{Certificates: certs[i : i+1], RootCAs: ca.pool(), MinVersion: tls.VersionTLS13}}
			defer tr.CloseIdleConnections()
			source := repo.HTTP{Client: &http.Client{Transport: tr}, Base: "https://" + addr}
			for _, p := range paths {
				f, err := source.Open(ctx, p, 0)
				if errors.Is(err, os.ErrNotExist) {
					continue // a root that is not there yet: devices ask for the next one
				}
				if err == nil {
					_, err = io.Copy(io.Discard, f)
					err = errors.Join(err, f.Close())
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	return time.Since(began), err
}

// bareFiles serves a folder, to those who have a certificate.
func bareFiles(dir, files string) error {
	ca, err := loadCA(dir)
	if err != nil {
		return err
	}
	cert, err := ca.sign(pkix.Name{CommonName: "bare"}, nil)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	s := &http.Server{Handler: http.FileServer(http.Dir(files)), ReadHeaderTimeout: time.Minute,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: ca.pool(), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}}
	return s.ServeTLS(ln, "", "")
}
