package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

const pngSignature = "\x89PNG\r\n\x1a\n"

// What shows a picture the way it is (PNG, third edition, section 11; animations among
// it). The others are texts, times, Exif, and what single programs put there.
var (
	pngColours = []string{"cHRM", "gAMA", "iCCP", "sRGB", "cICP"}
	pngNeeded  = append([]string{"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "sBIT", "bKGD", "pHYs", "hIST", "mDCV", "cLLI",
		"acTL", "fcTL", "fdAT"}, pngColours...)
)

// pngPicture is a PNG whose kept chunks still stand as they were.
type pngPicture struct {
	kept    [][]byte // IHDR first, IEND last
	colours [][]byte // of kept, those that say what the colours are
	profile string   // kind of colours of iCCP; "" if there is none
	turned  int
}

func parsePNG(data []byte) (picture, error) {
	p := pngPicture{turned: 1}
	pixels := false
	for rest := data[len(pngSignature):]; ; {
		if len(rest) < 12 || uint64(binary.BigEndian.Uint32(rest))+12 > uint64(len(rest)) {
			return nil, errors.New("the PNG is cut off")
		}
		n := int(binary.BigEndian.Uint32(rest))
		chunk, kind, body := rest[:n+12], string(rest[4:8]), rest[8:8+n]
		if crc32.ChecksumIEEE(chunk[4:8+n]) != binary.BigEndian.Uint32(chunk[8+n:]) {
			return nil, fmt.Errorf("the PNG is damaged: the checksum of its chunk %q at byte %d is wrong", kind, len(data)-len(rest))
		}
		rest = rest[n+12:]
		if len(p.kept) == 0 && kind != "IHDR" {
			return nil, fmt.Errorf("the PNG is damaged: it begins with a chunk %q", kind)
		}
		pixels = pixels || kind == "IDAT"
		switch {
		case slices.Contains(pngNeeded, kind):
			p.kept = append(p.kept, chunk)
			if slices.Contains(pngColours, kind) {
				p.colours = append(p.colours, chunk)
			}
			if kind == "iCCP" {
				p.profile = profileSpace(body)
			}
		case kind == "eXIf":
			p.turned = orientationOf(body)
		case kind[0]&0x20 == 0: // a capital letter: who does not know it cannot show the picture
			return nil, fmt.Errorf("the PNG needs its chunk %q, which nobody knows", kind)
		}
		if kind == "IEND" {
			if !pixels {
				return nil, errors.New("the PNG has no picture")
			}
			return p, nil
		}
	}
}

// profileSpace unpacks as much of a profile as says what it is for.
func profileSpace(body []byte) string {
	_, packed, ok := bytes.Cut(body, []byte{0})
	if !ok || len(packed) < 1 {
		return ""
	}
	r, err := zlib.NewReader(bytes.NewReader(packed[1:]))
	if err != nil {
		return ""
	}
	head := make([]byte, 20)
	if _, err := io.ReadFull(r, head); err != nil {
		return ""
	}
	return space(head)
}

func (p pngPicture) orientation() int { return p.turned }

func (p pngPicture) stripped() []byte {
	out := []byte(pngSignature)
	for i, c := range p.kept {
		out = append(out, c...)
		if i == 0 && p.turned != 1 {
			exif := exifOf(p.turned)
			out = binary.BigEndian.AppendUint32(out, uint32(len(exif)))
			body := append([]byte("eXIf"), exif...)
			out = binary.BigEndian.AppendUint32(append(out, body...), crc32.ChecksumIEEE(body))
		}
	}
	return out
}

func (p pngPicture) dressed(made []byte, gray bool) []byte {
	if p.profile != "" && !fits(p.profile, gray) {
		return made
	}
	const header = len(pngSignature) + 12 + 13 // to the end of IHDR
	return slices.Concat(made[:header], slices.Concat(p.colours...), made[header:])
}
