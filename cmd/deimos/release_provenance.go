package main

import (
	"crypto"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/provenance"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/sbom"
)

// What is attached to each release.
const (
	sbomName       = "sbom.cdx.json"
	provenanceName = "provenance.json"
)

// provenanceFlags say of a release what its files do not say themselves.
type provenanceFlags struct {
	Created    time.Time `format:"2006-01-02" placeholder:"DATE" help:"Date of the release, as in 2026-11-22. Default: none; a date of today would give other bytes tomorrow."`
	Builder    string    `placeholder:"URL" help:"Who builds it, for its provenance. Default: by hand."`
	Source     string    `placeholder:"URL" help:"Where its sources are. Default: those of Deimos."`
	Commit     string    `placeholder:"SHA" help:"Commit that it is built from. Default: the one that its programs name, if they do."`
	BuilderKey string    `type:"existingfile" placeholder:"FILE" help:"Key of the builder, which signs how the release was built. Ed25519, and none that signs releases."`
	passphraseFlags
}

// attachments makes what is attached to a release.
type attachments struct {
	provenance.Options
	agents    []string // files
	firmwares []string
	key       crypto.Signer // the builder's; nil: nothing is signed

	unknown []string // firmware without a bill
	commit  string   // that the statement names
}

func (f *provenanceFlags) attachments(agents, firmwares []string) (*attachments, error) {
	a := &attachments{Options: provenance.Options{Builder: f.Builder, Source: f.Source, Commit: f.Commit}, agents: agents, firmwares: firmwares}
	if f.BuilderKey == "" {
		return a, nil
	}
	var err error
	a.key, err = repo.LoadKey(f.BuilderKey, f.ask)
	return a, err
}

// attach is for [bundle.BuildOptions].
func (a *attachments) attach(m bundle.Manifest) ([]bundle.Document, error) {
	bill := sbom.New("deimos", m.Version)
	for _, file := range a.agents {
		if err := bill.AddProgram(file, m.Version); err != nil {
			return nil, err
		}
	}
	for _, file := range a.firmwares {
		known, err := bill.AddFirmware(file, m.Version)
		if err != nil {
			return nil, err
		}
		if !known {
			a.unknown = append(a.unknown, file)
		}
	}
	for _, p := range m.Parts {
		if !bill.Has(p.SHA256) {
			return nil, fmt.Errorf("the file of %s for %s was changed while it was packed; build the release again", p.Name, p.Platform)
		}
	}
	raw, err := bill.JSON(m.Created)
	if err != nil {
		return nil, err
	}
	list := bundle.Document{Name: sbomName, MediaType: sbom.MediaType, Content: raw}
	m.Attachments = append(slices.Clone(m.Attachments), list.Attachment())
	st, err := provenance.New(m, bill, a.Options)
	if err != nil {
		return nil, err
	}
	a.commit = provenance.Commit(st)
	how := bundle.Document{Name: provenanceName}
	if how.Content, how.MediaType, err = provenance.Seal(st, a.key); err != nil {
		return nil, err
	}
	return []bundle.Document{list, how}, nil
}

// lacks says in sentences what the attachments do not tell.
func (a *attachments) lacks() (all []string) {
	if a.commit == "" {
		all = append(all, "The commit that it was built from is not known; --commit SHA names it.")
	}
	if a.key == nil {
		all = append(all, "How it was built is not signed by who built it; --builder-key FILE signs it.")
	}
	for _, file := range a.unknown {
		all = append(all, fmt.Sprintf("What is in %s is not listed: there is no %s beside it, which \"make image\" writes.", filepath.Base(file), filepath.Base(sbom.Beside(file))))
	}
	return all
}
